"""Stable Diffusion 3's transformer and T5's encoder against diffusers and transformers: same weights, same numbers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from ldm_cli.core.condition import Condition
from ldm_cli.core.models.sd3_transformer_2d import SD3Transformer2DModel
from ldm_cli.core.models.sd3_transformer_2d_config import SD3Transformer2DConfig
from ldm_cli.core.models.t5_encoder import T5EncoderModel
from ldm_cli.core.models.t5_encoder_config import T5EncoderConfig
from tests.core.models.weights import num_parameters

from .test_models import assert_close, assert_same_weights

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
PUBLISHED: dict[str, dict[str, Any]] = {
    "3 medium": {**MEDIUM, "pos_embed_max_size": 192},
    "3.5 medium": {
        **MEDIUM,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    "3.5 large": {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
}
T5_XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}


def random_transformer(choose: random.Random) -> dict[str, Any]:
    heads, head_dim, layers = choose.choice([1, 2, 3]), choose.choice([4, 8]), choose.choice([1, 2, 3])
    return {
        "sample_size": choose.choice([8, 12]),
        "patch_size": choose.choice([1, 2, 4]),
        "in_channels": choose.choice([3, 4]),
        "out_channels": choose.choice([3, 4]),
        "num_layers": layers,
        "attention_head_dim": head_dim,
        "num_attention_heads": heads,
        "caption_projection_dim": heads * head_dim,
        "joint_attention_dim": choose.choice([5, 12]),
        "pooled_projection_dim": choose.choice([6, 10]),
        "pos_embed_max_size": choose.choice([12, 16]),
        "dual_attention_layers": tuple(i for i in range(layers) if choose.random() < 0.5),
        "qk_norm": choose.choice([None, "rms_norm"]),
    }


@pytest.mark.parametrize("seed", range(12))
def test_the_transformer_computes_what_theirs_does(seed: int) -> None:
    choose = random.Random(seed)
    fields = random_transformer(choose)
    ours = SD3Transformer2DModel(SD3Transformer2DConfig.from_mapping(fields))
    theirs = diffusers.SD3Transformer2DModel(**fields)
    torch.testing.assert_close(ours.pos_embed.pos_embed, theirs.pos_embed.pos_embed, rtol=0, atol=1e-6)
    assert_same_weights(ours, theirs)
    height, width = (4 * choose.choice([1, 2, 3]) for _ in range(2))
    x = torch.randn(2, fields["in_channels"], height, width)
    tokens, pooled = torch.randn(2, 7, fields["joint_attention_dim"]), torch.randn(2, fields["pooled_projection_dim"])
    t = torch.tensor([choose.uniform(0, 1000), choose.uniform(0, 1000)])
    with torch.no_grad():
        expected = theirs(x, tokens, pooled, t, return_dict=False)[0]
        assert_close(ours(x, t, Condition(tokens=tokens, pooled=pooled)), expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_transformers_have_their_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        ours = SD3Transformer2DModel(SD3Transformer2DConfig.from_mapping(PUBLISHED[name]))
        theirs = diffusers.SD3Transformer2DModel(**PUBLISHED[name])
    assert num_parameters(ours) == num_parameters(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def their_t5(**fields: Any) -> Any:
    return transformers.T5EncoderModel(transformers.T5Config(**fields))


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_t5_computes_what_theirs_does(seed: int, is_masked: bool) -> None:
    choose = random.Random(seed)
    fields: dict[str, Any] = {
        "vocab_size": 40,
        "d_model": choose.choice([8, 12]),
        "d_kv": choose.choice([4, 8]),
        "d_ff": choose.choice([16, 20]),
        "num_layers": choose.choice([1, 3]),
        "num_heads": choose.choice([1, 2, 3]),
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": choose.choice([8, 32]),
        "relative_attention_max_distance": choose.choice([20, 128]),
    }
    theirs = their_t5(**fields)
    ours = T5EncoderModel(T5EncoderConfig.from_hugging_face(theirs.config.to_dict()))
    state = {name: value for name, value in theirs.state_dict().items() if name != "encoder.embed_tokens.weight"}
    assert {name: value.shape for name, value in state.items()} == {k: v.shape for k, v in ours.state_dict().items()}
    state = {name: torch.randn_like(value) * value.shape[-1] ** -0.5 for name, value in state.items()}
    ours.load_state_dict(state)
    theirs.load_state_dict({**state, "encoder.embed_tokens.weight": state["shared.weight"]})
    ids = torch.randint(0, 40, (2, 200))
    mask = torch.arange(200)[None] < torch.tensor([[150], [200]]) if is_masked else None
    with torch.no_grad():
        expected = theirs.eval()(ids, attention_mask=None if mask is None else mask.long())[0]
        result = ours.eval()(ids, mask)
    if mask is not None:
        expected, result = expected[mask], result[mask]
    assert_close(result, expected)


def test_t5_xxl_has_its_number_of_parameters() -> None:
    with torch.device("meta"):
        theirs = their_t5(**T5_XXL)
        ours = T5EncoderModel(T5EncoderConfig.from_hugging_face(theirs.config.to_dict()))
    assert num_parameters(ours) == num_parameters(theirs)


def test_the_configs_go_both_ways() -> None:
    fields = random_transformer(random.Random(3))
    ours = SD3Transformer2DConfig.from_mapping(fields)
    theirs = diffusers.SD3Transformer2DModel.from_config(ours.to_hugging_face())
    assert SD3Transformer2DConfig.from_hugging_face(dict(theirs.config)) == ours
    t5 = T5EncoderConfig(d_model=8, d_kv=4, d_ff=16, num_heads=2)
    assert T5EncoderConfig.from_hugging_face(transformers.T5Config(**t5.to_hugging_face()).to_dict()) == t5
