"""The Hugging Face Hub: a saved SAE goes there with a card that says what it is, and comes from there by its name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

PREFIX = "hf:"


def fetch(name: str, files: Collection[str]) -> Path:
    """The folder in the local cache of ``hf:org/name`` or ``hf:org/name/folder``, downloaded if it is not there.

    Args:
        name: as above.
        files: names of the files to download, from that one folder.

    Raises:
        ValueError: if the name has another form, or there is nothing to be had by it.
    """
    organisation, _, rest = name.removeprefix(PREFIX).strip("/").partition("/")
    repository, _, folder = rest.partition("/")
    if not (organisation and repository):
        raise ValueError(f"a name on the Hub must be hf:org/name or hf:org/name/folder, got {name!r}")
    hub, inside = imported(), f"{folder}/" if folder else ""
    try:
        patterns = [inside + file for file in files]
        path = Path(hub.snapshot_download(f"{organisation}/{repository}", allow_patterns=patterns)) / folder
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, hub.errors.HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} must be on the Hub, readable by you, or in the local cache: {reason}") from None
    if not any((path / file).is_file() for file in files):
        raise ValueError(
            f"{name} must hold an SAE, got none of {', '.join(sorted(files))}; if its folders hold some, name one: "
            "hf:org/name/folder"
        )
    return path


def push(folder: Path, name: str, card: str, private: bool) -> str:
    """Upload a folder as the repository `name`, with its card; its address.

    Raises:
        ValueError: if the Hub does not take it.
    """
    hub = imported()
    (folder / "README.md").write_text(card)
    try:
        api = hub.HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Sparse autoencoder, saved by sae_lib")
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError, hub.errors.LocalTokenNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the Hub must accept {name}: {reason}; log in with: hf auth login") from None
    return str(address)


def imported() -> ModuleType:
    """huggingface_hub, which comes with the extra ``lm``."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise ValueError('the Hub needs the extra "lm": pip install "sae-put-to-the-test[lm]"') from None
    return huggingface_hub


def card(name: str, config: Mapping[str, Any], about: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    """The README of a repository: how it is loaded, what it is, what was measured, where it comes from.

    Args:
        name: of the repository.
        config: what ``config.json`` says.
        about: where it comes from, a line each; ``model`` becomes the card's base model if it names one on the Hub.
        metrics: by name, such as `sae_lib.evaluate` returns.
    """
    settings, model = config["config"], str(about.get("model", ""))
    base = f"base_model: {model}\n" if model.count("/") == 1 and not model.startswith(("/", ".")) else ""
    return "\n".join(
        [
            f"---\nlibrary_name: sae-put-to-the-test\n{base}tags:\n- sparse-autoencoder\n- interpretability\n---",
            f"# {name}",
            f"A sparse autoencoder of the variant `{config['variant']}`, with {settings['d_sae']:,} latents, of "
            f"activations of width {settings['d_in']:,}. It takes them as they are: their scale is in its weights.",
            f'```python\nimport sae_lib\n\nsae = sae_lib.load("{PREFIX}{name}")\nz, x_hat = sae.encode(x), sae(x)\n```',
            "## Measured",
            table("metric", {key: f"{value:.6g}" for key, value in metrics.items()}) or "Nothing yet.",
            "## Settings",
            table("argument", settings),
            "## Where it comes from",
            table("what", about),
        ]
    ).replace("\n#", "\n\n#")


def table(title: str, rows: Mapping[str, Any]) -> str:
    """A table of Markdown with two columns; nothing, if there are no rows."""
    if not rows:
        return ""
    return "\n".join([f"\n| {title} | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])
