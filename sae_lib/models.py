"""One way to open any language model, and to read, replace and differentiate its activations.

This is the only file that knows TransformerLens. Its `TransformerBridge` keeps the weights as Hugging Face has them:
nothing is folded or centred, so activations, logits and gradients are those of plain `transformers` (eager attention).

A *site* is TransformerLens' name of an activation: `"blocks.1.hook_resid_post"` is the residual stream after the second
block. It is read as (batch, pos, d_in); what has more dimensions, such as the heads of `attn.hook_z`, is flattened.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

ASSETS = Path(__file__).parent / "assets"
FOLDER_HOLDS = ("config.json", "*.safetensors", "tokenizer*")


class Tokens(NamedTuple):
    """Texts as token ids: one BOS first in each row, padded on the right.

    Attributes:
        ids: token ids.
        mask: True where a row holds a token (BOS included), False on padding.
    """

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]


class SiteReached(Exception):
    """Raised by a hook to end a forward pass at its site."""


def nearest(name: str, names: Iterable[str]) -> str:
    """The four names that look most like `name`, for an error message."""
    return ", ".join(difflib.get_close_matches(str(name), list(names), n=4, cutoff=0.0))


def empty_text(text: str, number: int) -> ValueError:
    """The error for a text without tokens."""
    return ValueError(f"a text must hold at least one token, got {text!r} at index {number}: leave it out")


def load_model(
    name: str | os.PathLike | TransformerBridge,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> LanguageModel:
    """Open a language model, in evaluation mode, with frozen weights. Chapter `pocket`.

    Args:
        name: `"pocket"` (embedded), a folder in Hugging Face's layout (config.json, safetensors, tokenizer), a name
            on the Hugging Face Hub, or a `TransformerBridge` that is already open.
        device: where it runs; by default the first GPU if there is one, else the CPU (a bridge stays where it is).
        dtype: of its weights; float32 by default, however they are stored (a bridge stays as it is).

    Raises:
        ValueError: if nothing can be opened under this name.
        ImportError: if TransformerLens is not installed.
    """
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        raise ImportError(
            'language models need the extra "lm", which is not installed: pip install "transformer-lens>=3.9,<5"'
        ) from error
    if isinstance(name, TransformerBridge):
        for place in (device, dtype):
            if place is not None:
                name.to(place)
        return LanguageModel(name, str(name.cfg.model_name))
    if not isinstance(name, str | os.PathLike):
        raise ValueError(f"name must be a string, a path or a TransformerBridge, got {type(name).__name__}")
    name = os.fspath(name)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    source = _source(name)
    try:
        with _silent_bars() if Path(source).is_dir() else nullcontext():
            bridge = TransformerBridge.boot_transformers(source, device=str(device), dtype=dtype or torch.float32)
    except OSError as error:  # what Hugging Face raises for a name that it cannot find or reach
        raise ValueError(
            f"name must be one of {_embedded()}, a folder with a model, or a name on the Hugging Face Hub that can be "
            f"reached from here, got {name!r}: {str(error).splitlines()[0]}"
        ) from error
    return LanguageModel(bridge, name)


def _embedded() -> list[str]:
    """Names of the models that ship with the library."""
    return sorted(config.parent.name for config in ASSETS.glob("*/config.json"))


@contextmanager
def _silent_bars() -> Iterator[None]:
    """No progress bars of Hugging Face's: reading a folder takes no time, and a page would keep them."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _source(name: str) -> str:
    """The folder, or the name on the Hub, that `name` stands for."""
    folder = ASSETS / name if name in _embedded() else Path(name).expanduser()
    if name and folder.is_dir():
        missing = [pattern for pattern in FOLDER_HOLDS if not any(folder.glob(pattern))]
        if missing:
            raise ValueError(
                f"a model's folder must hold {', '.join(FOLDER_HOLDS)}, but {name!r} has no {', '.join(missing)}: "
                "write them there with model.save_pretrained(folder) and tokenizer.save_pretrained(folder)"
            )
        return str(folder)
    near = difflib.get_close_matches(name, _embedded(), n=1)
    if near or not name or folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        remedy = f"did you mean {near[0]!r}?" if near else "there is no such folder"
        raise ValueError(
            f"name must be one of {_embedded()}, an existing folder or a name on the Hugging Face Hub, "
            f"got {name!r}: {remedy}"
        )
    return name


class LanguageModel:
    """A frozen language model whose activations can be read, replaced and differentiated at any site. Chapter `pocket`.

    Attributes:
        bridge: the model, as TransformerLens wraps it.
        name: what it was opened by.
        tokenizer: its Hugging Face tokenizer.
        d_model: width of the residual stream.
        n_layers: number of blocks.
        context: most tokens in a row, BOS included.
        vocab_size: number of token ids.
        bos: the id that starts each row: the tokenizer's BOS or, where it has none, its end-of-text.
    """

    def __init__(self, bridge: TransformerBridge, name: str):
        self.bridge = bridge.eval().requires_grad_(False)
        self.name = name
        self.tokenizer = bridge.tokenizer
        self.d_model, self.n_layers = int(bridge.cfg.d_model), int(bridge.cfg.n_layers)
        self.context, self.vocab_size = int(bridge.cfg.n_ctx), int(bridge.cfg.d_vocab)
        bos = self.tokenizer.bos_token_id
        self.bos = self.tokenizer.eos_token_id if bos is None else bos
        if self.bos is None:
            raise ValueError(
                f"the tokenizer must have a BOS or end-of-text token, {name!r} has neither: set tokenizer.bos_token"
            )

    def __repr__(self) -> str:
        sizes = f"n_layers={self.n_layers}, d_model={self.d_model}, context={self.context}"
        return f"LanguageModel({self.name!r}, {sizes}, vocab_size={self.vocab_size}, device='{self.device}')"

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return next(self.bridge.original_model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights and activations."""
        return next(self.bridge.original_model.parameters()).dtype

    # Sites

    @cached_property
    def _widths(self) -> dict[str, int]:
        """Width of each hook point whose values are floating, (batch, pos, ...), and as wide at 3 positions as at 2."""
        shapes = []
        for length in (2, 3):
            ids = torch.full((2, length), self.bos, device=self.device)
            cache = self.bridge.run_with_cache(ids, return_cache_object=False)[1]
            floating = {name: x for name, x in cache.items() if isinstance(x, Tensor) and x.is_floating_point()}
            shapes.append(
                {name: x.shape[2:] for name, x in floating.items() if x.ndim > 2 and x.shape[:2] == ids.shape}
            )
        short, long = shapes
        return {name: short[name].numel() for name in self.bridge.hook_dict if short.get(name, 0) == long.get(name)}

    def sites(self) -> list[str]:
        """Names of all sites."""
        return list(self._widths)

    def width(self, site: str) -> int:
        """d_in of a site.

        Raises:
            ValueError: if the model has no such site; the message lists the nearest names.
        """
        if site not in self._widths:
            raise ValueError(
                f"site must be one of the {len(self._widths)} names that model.sites() lists, got {site!r}: "
                f"the nearest are {nearest(site, self._widths)}"
            )
        return self._widths[site]

    def _check_replaceable(self, site: str) -> None:
        """Refuse the site whose replacement would not be what its name promises: the stream goes on beside it."""
        self.width(site)
        if site.endswith("hook_resid_mid"):
            raise ValueError(
                f"a site that is replaced or differentiated must be all that later layers see, but only the MLP reads "
                f"{site!r}: use hook_resid_pre, hook_attn_out or hook_resid_post"
            )

    # Tokens

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, however long, without BOS."""
        rows = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [row[1:] if row[:1] == [self.bos] else row for row in rows]

    def pad(self, rows: Sequence[Sequence[int]]) -> Tokens:
        """Rows of token ids without BOS -> Tokens on the model's device, BOS first, padded to the longest row."""
        lengths = torch.tensor([len(row) + 1 for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.full(mask.shape, self.bos)  # any id may stand on padding: no token looks ahead
        ids[mask] = torch.tensor([token for row in rows for token in (self.bos, *row)])
        return Tokens(ids.to(self.device), mask.to(self.device))

    def tokenize(self, texts: str | Sequence[str]) -> Tokens:
        """Texts -> Tokens, each text alone in its row, after one BOS.

        Raises:
            ValueError: if there is no text, one is empty, or one is longer than the context.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or not all(isinstance(text, str) for text in texts):
            kinds = sorted({type(text).__name__ for text in texts})
            raise ValueError(f"texts must be one or more strings, got {kinds or 'none'}")
        rows = self.encode(texts)
        for number, row in enumerate(rows):
            if not row:
                raise empty_text(texts[number], number)
            if len(row) + 1 > self.context:
                raise ValueError(
                    f"a text must fit the context of {self.context} tokens, BOS included, got {len(row) + 1} at index "
                    f"{number}: shorten it, or read it through Activations, which cuts long texts into windows"
                )
        return self.pad(rows)

    def content(self, tokens: Tokens) -> Bool[Tensor, "batch pos"]:
        """True where a position holds a token of the text: neither padding nor BOS, wherever it stands."""
        return tokens.mask & (tokens.ids != self.bos)

    def _checked(self, tokens: Tokens | Tensor) -> Tokens:
        """Tokens on the model's device; a bare tensor of ids has no padding."""
        if not isinstance(tokens, Tokens):
            tokens = Tokens(tokens, torch.ones_like(tokens, dtype=torch.bool))
        ids = tokens.ids
        if ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
            raise ValueError(f"token ids must be integers (batch, pos), got {ids.dtype} of shape {tuple(ids.shape)}")
        if ids.shape[1] > self.context:
            raise ValueError(f"a row must fit the context of {self.context} tokens, got {ids.shape[1]}: cut it")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"token ids must be in [0, {self.vocab_size}), got {int(ids.min())} to {int(ids.max())}")
        return Tokens(ids.to(self.device), tokens.mask.to(self.device))

    # Running the model

    def _run(self, ids: Tensor, *hooks: tuple[str, Callable]) -> Tensor:
        """Logits, with hooks at sites. Padding needs no mask: it stands on the right, and no token looks ahead."""
        return self.bridge.run_with_hooks(ids, fwd_hooks=list(hooks), return_type="logits")

    def activations(
        self, tokens: Tokens | Tensor, site: str | Sequence[str]
    ) -> Float[Tensor, "batch pos d_in"] | tuple[Float[Tensor, "batch pos _"], ...]:
        """Activations at a site, all positions; `content` tells which are text. Nothing after the site is computed.

        Several sites are read in one forward pass: a tuple, in their order.
        """
        sites, seen = {site} if isinstance(site, str) else set(site), {}
        for name in sites:
            self.width(name)

        def keep(activation: Tensor, hook: Any, name: str) -> None:
            seen[name] = activation.detach().flatten(2)
            if len(seen) == len(sites):
                raise SiteReached

        with suppress(SiteReached):
            self._run(self._checked(tokens).ids, *((name, partial(keep, name=name)) for name in sites))
        return seen[site] if isinstance(site, str) else tuple(seen[name] for name in site)

    def mlp_weights(self, layer: int, name: str) -> Float[Tensor, "d_mlp d_model"] | None:
        """What neurons read by ("in", and "gate" of a gated MLP, else None) or write by ("out"), one row a neuron."""
        weights = getattr(self.bridge.blocks[layer].mlp, f"W_{name}")
        return weights if weights is None or name == "out" else weights.T

    def logits(
        self, tokens: Tokens | Tensor, site: str | None = None, patch: Callable[[Tensor], Tensor] | None = None
    ) -> Float[Tensor, "batch pos vocab"]:
        """Logits, where `patch` may replace the activation at a site.

        Args:
            tokens: Tokens, or ids (batch, pos) without padding.
            site: where to replace; given together with patch, or not at all.
            patch: from the activation (batch, pos, d_in) to its replacement, of the same shape. It decides for all
                positions; to keep BOS and padding, `torch.where(model.content(tokens)[..., None], replaced, x)`.

        Raises:
            ValueError: for a site that does not exist or cannot be replaced, or a replacement of another shape.
        """
        if (site is None) != (patch is None):
            raise ValueError(f"site and patch must be given together, got site={site!r} and patch={patch!r}")
        tokens = self._checked(tokens)
        if patch is None:
            return self._run(tokens.ids)
        self._check_replaceable(site)

        def replace(activation: Tensor, hook: Any) -> Tensor:
            x = activation.flatten(2)
            replaced = patch(x)
            if replaced.shape != x.shape:
                raise ValueError(f"patch must keep the shape {tuple(x.shape)}, got {tuple(replaced.shape)}")
            return replaced.to(activation.dtype).view_as(activation)

        return self._run(tokens.ids, (site, replace))

    def loss(
        self,
        tokens: Tokens | Tensor,
        site: str | None = None,
        patch: Callable[[Tensor], Tensor] | None = None,
        labels: Int[Tensor, "batch next"] | None = None,
    ) -> tuple[Float[Tensor, "batch next"], Bool[Tensor, "batch next"]]:
        """Cross-entropy of each next token, in nats, and where it counts: where the next token is not padding.

        Column t predicts token t + 1 from tokens 0 to t, so there are pos - 1. For site and patch see `logits`.
        `labels` stand in the place of the true next tokens, as those of `sample`.
        """
        tokens = self._checked(tokens)
        labels = tokens.ids[:, 1:] if labels is None else labels
        if labels.shape != tokens.ids[:, 1:].shape:
            shape = tuple(tokens.ids[:, 1:].shape)
            raise ValueError(f"labels must be one for each next token, of shape {shape}, got {tuple(labels.shape)}")
        logits = self.logits(tokens, site, patch)[:, :-1]
        if logits.dtype.itemsize < 4:
            logits = logits.float()
        return F.cross_entropy(logits.mT, labels, reduction="none"), tokens.mask[:, 1:]

    @torch.no_grad()
    def sample(self, tokens: Tokens | Tensor, generator: torch.Generator) -> Int[Tensor, "batch next"]:
        """For each next token one that the model itself draws there, after the true tokens before it.

        The true next token has no part in it. Chapter `gradient`.

        Args:
            tokens: Tokens, or ids (batch, pos) without padding.
            generator: of the draws, on the CPU.
        """
        likely = self.logits(tokens)[:, :-1].float().softmax(-1).cpu()
        drawn = torch.multinomial(likely.flatten(0, 1), 1, generator=generator)
        return drawn.view(likely.shape[:2]).to(self.device)

    def gradients(
        self, tokens: Tokens | Tensor, site: str, labels: Int[Tensor, "batch next"] | None = None
    ) -> tuple[Float[Tensor, "batch pos d_in"], Float[Tensor, "batch pos d_in"]]:
        """Activations at a site, and there the gradient of the model's loss, summed over all next tokens that count.

        Since no token looks ahead, row t is the gradient of the losses at t and after. A text's last token has no next
        one: its gradient is zero. Only the layers above the site are differentiated. `labels` stand in the place of the
        true next tokens, as those of `sample`. Chapter `gradient`.

        Raises:
            ValueError: if the site does not exist or cannot be replaced, or the loss does not depend on it.
        """
        leaves = []

        def splice(x: Tensor) -> Tensor:
            leaves.append(x.detach().requires_grad_())
            return leaves[0]

        with torch.enable_grad():
            loss, counted = self.loss(tokens, site, splice, labels)
            total = loss[counted].sum()
        (gradient,) = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else (None,)
        if gradient is None:
            raise ValueError(f"a site must affect the loss to be differentiated, {site!r} does not: take another")
        return leaves[0].detach(), gradient
