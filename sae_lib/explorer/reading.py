"""What a page shows of a model beyond the examples: activations around them, histograms, importance, logits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from tqdm.auto import tqdm

from sae_lib.metrics.first_letter import Absorber, FirstLetter
from sae_lib.neuron_embeddings import Examples, Units, passes, replaced
from sae_lib.sae import SAE

BACK, AHEAD = 20, 10
"""Tokens of a window before and after its key token; those of the paper's viewer."""
BINS = 24
"""Bars of a histogram, from 0 to the unit's maximum."""
RANDOM = 100
"""Tokens drawn from the texts, for the distance of inputs that no unit chose."""
STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
"""Ends of sites whose vectors are added to the residual stream, or are it."""
NEURONS = ("mlp.hook_post", "mlp.out.hook_in")
"""Ends of sites where neurons are, which the MLP's output weights read."""


class Around(NamedTuple):
    """What stands around the examples.

    Attributes:
        windows: activation from `BACK` tokens before the key token to `AHEAD` after it, in 255ths of the unit's
            maximum; 0 where it is negative, and outside the text.
        counts: how many tokens of all texts are active in each of `BINS` equal steps up to the maximum.
        inputs: what is read at `RANDOM` tokens, all texts' tokens being equally likely.
    """

    windows: UInt8[Tensor, "units most window"]
    counts: Int[Tensor, "units bins"]
    inputs: Float[Tensor, "random d_in"]


@torch.no_grad()
def around(units: Units, examples: Examples) -> Around:
    """Activations around all examples, of all tokens in steps, and random inputs: one more pass over the texts."""
    n, model = len(units), units.model
    windows = torch.zeros(*examples.document.shape, BACK + 1 + AHEAD, dtype=torch.uint8)
    counts = torch.zeros(n * BINS, dtype=torch.int64)
    unit, number = (examples.document >= 0).nonzero(as_tuple=True)
    text, position = examples.document[unit, number], examples.position[unit, number]
    offsets, first = torch.arange(-BACK, AHEAD + 1), BINS * torch.arange(n)
    maximum = examples.maximum.where(examples.maximum > 0, 1)
    lengths = torch.tensor([len(row) for row in examples.tokens])
    ends = lengths.cumsum(0)
    drawn = torch.randperm(int(ends[-1]), generator=torch.Generator().manual_seed(0))[:RANDOM]
    its_text = torch.searchsorted(ends, drawn, right=True)
    its_place = drawn - (ends - lengths)[its_text] + 1  # BOS stands first
    inputs = torch.empty(len(drawn), units.weights.shape[1])
    for numbers, tokens in passes(model, examples.tokens, range(len(examples.tokens)), "windows"):
        h, a = units.activations(tokens)
        share = a.float().clamp(min=0) * model.content(tokens)[..., None]
        share = share.cpu() / maximum
        bins = (share * BINS).long().clamp(max=BINS - 1) + first
        counts += bins[share > 0].bincount(minlength=n * BINS)
        row_of = torch.full((len(examples.tokens),), -1)
        row_of[numbers] = torch.arange(len(numbers))
        here = (row_of[text] >= 0).nonzero()[:, 0]
        places = position[here, None] + 1 + offsets  # BOS stands first; its share is 0, as that of padding
        inside = (places >= 0) & (places < share.shape[1])
        seen = share[row_of[text[here]][:, None], places.where(inside, 0), unit[here, None]]
        windows[unit[here], number[here]] = (255 * seen.where(inside, 0)).round().clamp(max=255).byte()
        of_these = (row_of[its_text] >= 0).nonzero()[:, 0]
        inputs[of_these] = h.float().cpu()[row_of[its_text[of_these]], its_place[of_these]]
    return Around(windows, counts.view(n, BINS), inputs)


@torch.no_grad()
def importances(
    units: Units, texts: Sequence[Sequence[int]], wanted: Sequence[tuple[int, int, int]]
) -> list[Float[Tensor, " tokens"]]:
    """`sae_lib.neuron_embeddings.importance` of many examples, of the last `BACK` tokens and the key token of each.

    Examples in one text share its forward passes.

    Args:
        units: which population.
        texts: ids of each text's tokens, without BOS.
        wanted: unit, text and position of the key token of each example.
    """
    found = [torch.empty(0)] * len(wanted)
    by_text: dict[int, list[int]] = {}
    for number, (_, text, _) in enumerate(wanted):
        by_text.setdefault(text, []).append(number)
    for text, numbers in tqdm(by_text.items(), "importance", unit="text", leave=False, delay=2):
        spans = {number: range(max(0, wanted[number][2] - BACK), wanted[number][2] + 1) for number in numbers}
        places = sorted({t for span in spans.values() for t in span})
        row_of = {t: row for row, t in enumerate(places, 1)}
        variants = replaced(units.model, texts[text][: places[-1] + 1], places)
        for number in numbers:
            found[number] = torch.empty(len(variants))
        for rows, tokens in passes(units.model, variants, range(len(variants)), "importance"):
            a = units.activations(tokens)[1].float().cpu()
            for number, span in spans.items():
                found[number][rows] = a[:, span.stop, wanted[number][0]]  # BOS stands first
        for number, span in spans.items():
            found[number] = found[number][0] - found[number][[row_of[t] for t in span]]
    return found


def written(units: Units) -> Float[Tensor, "units d_model"] | None:
    """What each unit writes into the residual stream: output weights, or a decoder row; None where it writes none."""
    model, values = units.model, units.values
    layer = re.fullmatch(r"blocks\.(\d+)\.(.+)", values if isinstance(values, str) else units.site)
    if layer is None:
        return None
    number, site = int(layer[1]), layer[2]
    out = model.mlp_weights(number, "out") if site in NEURONS else None
    if isinstance(values, str):
        return out
    rows = values.W_dec.detach()
    return rows if site in STREAM else rows @ out.to(rows) if out is not None else None


@torch.no_grad()
def logit_effects(units: Units, most: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The tokens that each unit promotes and suppresses most: what the model's end makes of its direction alone.

    ``(norm(v) - norm(0)) W_U`` with the final norm's gain and without its bias, less its mean over the vocabulary: the
    logits if the unit's direction v were all that is in the residual stream, whatever its length. Gains of a norm
    behind the MLP, as Gemma-2 has it, are left out.

    Args:
        units: which population.
        most: tokens at either end.

    Returns:
        tokens and logits of the promoted, tokens and logits of the suppressed, (units, most) each, the strongest
        first; None if the units do not write into the residual stream.
    """
    directions = written(units)
    if directions is None:
        return None
    bridge = units.model.bridge
    nothing = torch.zeros(1, 1, units.model.d_model, device=units.model.device, dtype=units.model.dtype)
    zero, bias = bridge.ln_final(nothing), bridge.unembed(nothing)
    found = []
    for rows in F.normalize(directions.float(), dim=1).split(256):
        seen = bridge.ln_final((rows * rows.shape[1] ** 0.5).to(nothing)[None]) - zero
        logits = (bridge.unembed(seen) - bias)[0].float()
        logits = logits - logits.mean(1, keepdim=True)
        best, worst = logits.topk(most), logits.topk(most, largest=False)
        found.append([part.cpu() for part in (best.indices, best.values, worst.indices, worst.values)])
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


@torch.no_grad()
def decoder_neighbours(sae: SAE, most: int = 8) -> tuple[Int[Tensor, "d_sae most"], Float[Tensor, "d_sae most"]]:
    """The latents whose decoder rows point most the same way, and the cosines."""
    directions, found = F.normalize(sae.W_dec.detach().float(), dim=1), []
    for start in range(0, sae.d_sae, 1024):
        cosines = directions[start : start + 1024] @ directions.T
        cosines[range(len(cosines)), range(start, start + len(cosines))] = -torch.inf
        found.append(cosines.topk(min(most, sae.d_sae - 1)))
    return torch.cat([part.indices for part in found]).cpu(), torch.cat([part.values for part in found]).cpu()


def absorptions(units: Units) -> tuple[list[Absorber], str]:
    """Which latents stand in for the main latents of letters, where words can tell; and a word on what was asked."""
    try:
        task = FirstLetter(units.model, units.site)
    except ValueError as error:
        return [], f"not measured: {error}"
    return task.absorbers(units.values), f"first letters of {task.words:,} words, {len(task.letters)} letters"


def token_texts(tokenizer: Any, tokens: Iterable[int]) -> list[str]:
    """Each token as it stands in running text, behind a word: with the space that comes before it, if one does.

    Bytes that are no text alone are written as SentencePiece does: <0xE2>.
    """
    names = enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    word = next((number for number, name in names if name and name.isascii() and name.isalpha()), 0)
    before, texts = tokenizer.decode([word]), []
    for token in tokens:
        name = tokenizer.convert_ids_to_tokens(token)  # none for rows of the vocabulary that only fill it up
        texts.append(f"<{token}>" if name is None else text_of(tokenizer.decode([word, token]), before, name))
    return texts


def text_of(both: str, before: str, name: str) -> str:
    """What a token adds to the text before it.

    >>> text_of("and cats", "and", "cats"), text_of("and\N{REPLACEMENT CHARACTER}", "and", "\u0120\u00e2")
    (' cats', '<0x20><0xE2>')
    """
    text = both.removeprefix(before) if both.startswith(before) else name
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    numbers = [BYTES.get(character) for character in name]
    readable = None in numbers or re.fullmatch("<0x[0-9A-F]{2}>", name)
    return name if readable else "".join(f"<0x{number:02X}>" for number in numbers)


def byte_characters() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = byte_characters()
