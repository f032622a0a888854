"""What is asked of vLLM on a GPU, where it cannot run here: arguments, their order, and what is done around a sleep."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.executor.abstract import Executor

from ovr_megatron.config import ParallelConfig, RLConfig, RolloutConfig
from ovr_megatron.launch import compose
from ovr_megatron.rl import setup
from ovr_megatron.rollout import engine as engine_module
from ovr_megatron.rollout.engine import RolloutEngine, _settings, clear_positions, undisturbed
from ovr_megatron.rollout.sampling import RolloutError
from ovr_megatron.runtime import distributed


class FakeLLM:
    """Notes the calls of `LLM` that put it to sleep and wake it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.llm_engine = SimpleNamespace(reset_encoder_cache=lambda: None)

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {' '.join(tags)}")

    def reset_prefix_cache(self) -> bool:
        return True

    def reset_mm_cache(self) -> None:
        pass


def sleeping_engine(can_sleep: bool = True) -> RolloutEngine:
    """An engine that sleeps with all of its parts, and where ``can_sleep`` its vLLM, too, as on a GPU."""
    engine = RolloutEngine.__new__(RolloutEngine)
    engine._llm, engine._asleep, engine._empty, engine._can_sleep = FakeLLM(), set(), False, can_sleep  # type: ignore[assignment]
    engine._compiles = False
    engine.sleep()
    return engine


def test_an_engine_sleeps_again_whose_weights_alone_are_awake() -> None:
    """So it is after an update, if this rank has no problem of an evaluation to answer."""
    engine = sleeping_engine()
    engine._wake("weights")
    engine.sleep(deep=True)
    engine.sleep(deep=True)
    assert engine._llm.calls == ["sleep 1", "wake weights", "sleep 2"]


@pytest.mark.parametrize("can_sleep", [True, False], ids=["GPU", "CPU"])
def test_a_deep_sleep_drops_no_weights_that_are_on_the_host(can_sleep: bool) -> None:
    """VLLM would free nothing, so that the engine must go on answering with them."""
    engine = sleeping_engine(can_sleep)
    engine.sleep(deep=True)
    engine._wake_to_work()
    engine.sleep(deep=True)
    with pytest.raises(RolloutError, match="has no weights"):
        engine._wake_to_work()
    engine.sleep()
    assert engine._empty
    assert engine._llm.calls == (["sleep 1", "wake weights kv_cache", "sleep 2"] if can_sleep else [])


def test_vllm_takes_no_second_sleep() -> None:
    asked: list[str] = []
    executor = SimpleNamespace(
        sleeping_tags=set(), is_sleeping=False, collective_rpc=lambda name, **_: asked.append(name)
    )
    Executor.sleep(executor, level=1)
    Executor.sleep(executor, level=2)
    assert asked == ["sleep"]


def test_products_of_float32_are_float32_in_tritons_attention() -> None:
    """Triton's own default is TF32; its variable is read each time that a kernel is compiled."""
    from triton import knobs

    before = knobs.language.fp32_default
    with undisturbed():
        assert knobs.language.fp32_default == "ieee"
    assert knobs.language.fp32_default == before


@pytest.mark.parametrize(("own", "share"), [(0.0, 0.01), (0.3, 0.3)])
def test_a_cache_of_given_size_asks_for_no_other_memory(
    processor: object, monkeypatch: pytest.MonkeyPatch, own: float, share: float
) -> None:
    """VLLM refuses to start where less than its share is free, though it takes the cache's size and no more."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = _settings(RolloutConfig(kv_cache_gib=4.0, gpu_memory_utilization=own), processor, "bfloat16", 256)  # type: ignore[arg-type]
    assert (settings["kv_cache_memory_bytes"], settings["gpu_memory_utilization"]) == (4 << 30, share)


def test_positions_of_padding_are_zero_after_a_deep_sleep() -> None:
    positions = torch.full((3, 5), 2**40)
    state = SimpleNamespace(rope_state=SimpleNamespace(positions=positions))
    clear_positions(SimpleNamespace(model_runner=SimpleNamespace(model_state=state)))
    assert positions.count_nonzero() == 0
    clear_positions(SimpleNamespace(model_runner=SimpleNamespace()))  # model runner V1


def test_vllm_stays_on_the_trainers_stream(
    processor: object, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream is set before vLLM starts, so that its communicator takes that one."""
    distributed.start(ParallelConfig(), seed=5)
    order: list[str] = []

    class Stop(Exception):
        pass

    def start(**settings: object) -> None:
        order.append("vLLM")
        raise Stop

    monkeypatch.setattr(engine_module, "LLM", start)
    monkeypatch.setattr(engine_module, "complete_folder", lambda folder: folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the trainer's")
    monkeypatch.setattr(torch.cuda, "set_stream", order.append)
    with pytest.raises(Stop):
        RolloutEngine(str(tmp_path), RolloutConfig(), processor, "bfloat16", 256)  # type: ignore[arg-type]
    assert order == ["the trainer's", "vLLM"]


@pytest.mark.parametrize(("offload", "calls"), [(True, ["sleep deep", "update"]), (False, ["update"])])
def test_the_cache_is_gone_before_an_offloaded_policy_comes_back(
    monkeypatch: pytest.MonkeyPatch, offload: bool, calls: list[str]
) -> None:
    """With ``offload`` vLLM's cache takes what the trainer's models left free."""
    order: list[str] = []
    fake = SimpleNamespace(
        sleep=lambda deep=False: order.append("sleep deep" if deep else "sleep"),
        update=lambda held: order.append("update"),
    )
    monkeypatch.setattr(setup, "RolloutEngine", lambda *arguments, **options: fake)
    monkeypatch.setattr(setup, "GraderPool", lambda *arguments: None)
    monkeypatch.setattr(setup, "Rollouts", lambda *arguments: None)
    config = compose("tiny_rl", ["run.dir=x", "model.path=m", f"offload={offload}"])
    assert isinstance(config, RLConfig)
    models = SimpleNamespace(policy=SimpleNamespace(held=lambda: []), world=SimpleNamespace(rank=0, size=1))
    setup.build_rollouts(config, "m", SimpleNamespace(shape=None), models)  # type: ignore[arg-type]
    assert order == calls
