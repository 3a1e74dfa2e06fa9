"""From prompts to what conditions the denoiser: the text encoder's states, words weighted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_cli.core.models.clip import CLIPTextModel
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.reporting import Reporter
from ldm_cli.sampling.prompt_weights import WeightedText, parse_weights


@dataclass(frozen=True)
class TextStates:
    """Encodes prompts, one by one: a prompt's states must not depend on the others (see fixed_rows).

    Attributes:
        text_encoder, tokenizer: that belong together.
        length: L, tokens per prompt, both special tokens included.
        weighted: whether `(word:1.3)` is a weight, or text like all else.
    """

    text_encoder: CLIPTextModel
    tokenizer: Tokenizer
    length: int
    weighted: bool

    @torch.inference_mode()
    def encode(self, prompts: Iterable[str], reporter: Reporter) -> dict[str, Tensor]:
        """States [1, L, D] of every prompt; one that is too long is cut, and reported."""
        return {prompt: self._encode(prompt, reporter) for prompt in dict.fromkeys(prompts)}

    def _encode(self, prompt: str, reporter: Reporter) -> Tensor:
        pieces = parse_weights(prompt) if self.weighted else [WeightedText(prompt, 1.0)]
        if len(pieces) == 1 and pieces[0].weight == 1.0:
            tokens = self.tokenizer.encode([pieces[0].text], self.length)
            ids, cut = tokens.input_ids, "".join(rest for _, rest in tokens.truncated)
            weights = None
        else:
            ids, weights, cut = self._weighted_ids(pieces)
        if cut:
            places = self.length - 2
            reporter.warn(f"prompt {prompt[:40]!r}… has more than {places} tokens; this was cut: {_shortened(cut)!r}")
        device = next(self.text_encoder.parameters()).device
        states: Tensor = self.text_encoder(ids.to(device)).last_hidden_state
        if weights is None:
            return states
        # Away from the empty prompt's states and towards it, place by place: a weight of 1 changes nothing.
        empty = self.text_encoder(self.tokenizer.encode([""], self.length).input_ids.to(device)).last_hidden_state
        return torch.lerp(empty, states, weights.to(device, states.dtype)[None, :, None])

    def _weighted_ids(self, pieces: list[WeightedText]) -> tuple[Tensor, Tensor, str]:
        """Token ids int64 [1, L], a weight for each [L], and what found no room."""
        places, cut = self.length - 2, ""
        ids: list[int] = []
        weights: list[float] = []
        for piece in pieces:
            room = places - len(ids)
            tokens = self.tokenizer.encode([piece.text], room + 2)
            cut += tokens.truncated[0][1] if tokens.truncated else ""
            num_tokens = tokens.num_tokens[0] - 2
            ids += tokens.input_ids[0, 1 : 1 + num_tokens].tolist()
            weights += [piece.weight] * num_tokens
        rest = places - len(ids)
        row = [self.tokenizer.start_id, *ids, self.tokenizer.end_id, *[self.tokenizer.pad_id] * rest]
        return torch.tensor([row]), torch.tensor([1.0, *weights, 1.0, *[1.0] * rest]), cut


def _shortened(text: str, length: int = 100) -> str:
    """The beginning and the end of a long text."""
    return text if len(text) <= 2 * length else f"{text[:length]} … {text[-length:]}"
