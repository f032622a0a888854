"""The limit of tokens by iteration."""

from ovr_megatron.config import StageConfig
from ovr_megatron.ppo.curriculum import max_tokens


def test_the_papers_curriculum() -> None:
    stages = [StageConfig(until=u, max_tokens=m) for u, m in ((300, 24576), (700, 32768), (900, 49152))]
    assert [max_tokens(stages, i) for i in (0, 299, 300, 699, 700, 899)] == [24576, 24576, 32768, 32768, 49152, 49152]
