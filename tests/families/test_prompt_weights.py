import pytest
import torch

from ldm_cli.families.prompt_chunks import PromptReading
from ldm_cli.families.prompt_weights import parse_weights
from ldm_cli.reporting import SilentReporter
from tests.sampling.tiny import tiny_pipeline

WEIGHTED = PromptReading(weighted=True)


def pairs(prompt):
    return [(piece.text, round(piece.weight, 6)) for piece in parse_weights(prompt)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [("a cat", 1)]),
        ("", [("", 1)]),
        ("a (red:1.3) cat", [("a ", 1), ("red", 1.3), (" cat", 1)]),
        ("((red:1.5) cat:2)", [("red", 3), (" cat", 2)]),
        ("(a (b) c:2)", [("a (b) c", 2)]),
        ("a (plain) and [b]", [("a (plain) and [b]", 1)]),
        (r"\(red:1.3\)", [("(red:1.3)", 1)]),
        (r"(a\)b:.5)", [("a)b", 0.5)]),
        ("12:30) (open", [("12:30) (open", 1)]),
        ("(ratio 1:2:3)", [("ratio 1:2", 3)]),
        ("(x: 99)", [("x", 10)]),
        ("(:2)", [("", 1)]),
    ],
)
def test_only_a_number_makes_parentheses_special(prompt, expected):
    assert pairs(prompt) == expected


def test_a_thousand_open_parentheses_are_text():
    assert pairs("(" * 5000) == [("(" * 5000, 1)]
    assert pairs("(" * 500 + "a" + ":2)" * 500)[0][0] == "a"


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


def states(pipeline, prompt, weighted=True):
    reading = PromptReading(weighted=weighted)
    return pipeline.family.encoder.encode_prompts([prompt], reading, num_chunks=1, warn=list).tokens


def test_weight_one_is_the_plain_prompt_bit_for_bit(pipeline):
    plain = states(pipeline, "a red circle", weighted=False)
    assert torch.equal(states(pipeline, "a red circle"), plain)
    assert torch.equal(states(pipeline, "a (red:1.0) circle"), plain)


def test_weighted_words_move_on_the_line_from_the_empty_prompt(pipeline):
    plain, empty = states(pipeline, "a red circle", weighted=False), states(pipeline, "", weighted=False)
    strong, none = states(pipeline, "a (red:1.5) circle"), states(pipeline, "a (red:0) circle")
    moved = (strong - plain).abs().sum(-1)[0] > 0
    start, end = int(moved.nonzero()[0]), int(moved.nonzero()[-1]) + 1
    assert start >= 2, "start token and 'a' stay"
    torch.testing.assert_close(strong[0, start:end], (empty + 1.5 * (plain - empty))[0, start:end])
    torch.testing.assert_close(none[0, start:end], empty[0, start:end])
    assert torch.equal(strong[0, end:], plain[0, end:])


def test_without_weighting_the_syntax_is_text(pipeline):
    assert not torch.equal(
        states(pipeline, "a (red:1.5) circle", weighted=False), states(pipeline, "a (red:1.5) circle")
    )


def test_prompts_of_one_batch_do_not_see_one_another(pipeline):
    prompts = ["a red circle", "a (red:1.5) circle", "(blue:0.5) (square:2)", ""]
    together = pipeline.family.encoder.encode_prompts(prompts, WEIGHTED, num_chunks=1, warn=list).tokens
    torch.testing.assert_close(together, torch.cat([states(pipeline, prompt) for prompt in prompts]))


def test_a_weighted_prompt_that_is_cut_says_so(pipeline):
    reporter = SilentReporter()
    prompt = "(red circle:1.2) " * 60 + "zebra"
    encoded = pipeline.family.encoder.encode_prompts([prompt], WEIGHTED, num_chunks=1, warn=reporter.warn).tokens
    assert encoded.shape == (1, 40, 24)
    assert "zebra" in reporter.messages[0]
    assert "--long-prompts (sampling.long_prompts=true) keeps it" in reporter.messages[0]
