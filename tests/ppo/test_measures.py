"""Texts of responses are bounded and harmless wherever they are shown."""

import numpy as np

from ovr_megatron.ppo.batch import Response
from ovr_megatron.ppo.measures import SHOWN_CHARACTERS, sample_texts, to_printable


def response(text: str, reward: float) -> Response:
    return Response(0, 0, [1, 2], np.zeros(2, np.float32), True, text, reward, "value")


def test_control_characters_are_replaced_and_long_texts_cut():
    assert to_printable("a\x1b[2Jb\r\u202e\nc") == "a\ufffd[2Jb\ufffd\ufffd\nc"
    assert to_printable("x" * 2005).endswith("x ... (5 more characters)")
    assert len(to_printable("\x00" * 10**6)) < SHOWN_CHARACTERS + 50


def test_a_right_and_a_wrong_response_are_shown():
    texts = sample_texts([response("no", 0.0), response("yes", 1.0), response("again", 1.0)])
    assert texts == {"wrong": "reward 0, 2 tokens, value\nno", "right": "reward 1, 2 tokens, value\nyes"}
