"""The block that a run prints before its first step."""

from ovr_megatron.plan.heading import show_heading


def test_foreign_text_stays_on_its_line_and_steers_no_terminal() -> None:
    rows = [("model", "all train"), ("source", "first\nline\x1b[2J\u202etxt")]
    assert show_heading("SFT in runs/x", rows).splitlines() == [
        "SFT in runs/x",
        "  model   all train",
        r"  source  first line\x1b[2J\u202etxt",
    ]
