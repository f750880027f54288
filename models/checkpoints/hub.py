"""Checkpoints by name: on disk or on the Hugging Face Hub, ours or in the layout of the published weights.

    locate_checkpoint("runs/demo")                          # a directory or run that exists: itself, no network
    locate_checkpoint("owner/name", revision="v1")          # else a repository: its checkpoint in the local cache
    locate_checkpoint("edje.pth")                           # published weights: converted once (conversion.py)
    upload_checkpoint(Path("checkpoints/edje"), "owner/name")

huggingface_hub does the transfer, with its settings (HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, HF_TOKEN): what was fetched
once loads without network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, one_line
from ..language.captions import VOCABULARY_FILE
from .checkpoint import (
    CARD_FILE,
    CHECKPOINT_FILES,
    CONFIG_FILE,
    WEIGHTS_FILE,
    is_relative_to_checkpoint,
    read_config,
    read_latest,
    resolve_checkpoint,
)
from .conversion import cached_conversion
from .published import CONFIG_JSON, PUBLISHED_REPOSITORIES
from .weight_files import INDEX_SUFFIX, WEIGHT_SUFFIXES, choose_weight_file, shard_names

_NAMES_OF_BACKBONES = {
    "name": "--backbone-name", "pretrained": "--backbone-pretrained", "token_pretrained": "--token-pretrained"
}  # fmt: skip
"""Keys that may hold a path, and what exports a checkpoint under another name."""
_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def locate_checkpoint(name: str | Path, revision: str | None = None) -> Path:
    """The checkpoint directory that `name` means: a file, directory or run that exists, else OWNER/NAME on the Hub.

    Published weights, in either place, are converted once; the directory is then one of the cache. revision: branch,
    tag or commit of the repository; for a directory there is none. Only a checkpoint's own files are fetched, none of
    which runs code. Raises UserError, naming both readings, where neither leads to a checkpoint."""
    if not isinstance(name, str | Path):
        raise UserError(f"a checkpoint is a {type(name).__name__}; expected a path, or OWNER/NAME on the Hub")
    path = Path(name)
    exists = _exists(path)
    if exists or not _REPOSITORY.fullmatch(str(name)):
        if revision is not None and exists:
            raise UserError(f"{name}: on this disk, where it has no revision {revision!r}; leave revision out")
        if path.name == WEIGHTS_FILE and (path.parent / CONFIG_FILE).is_file():
            return path.parent
        return cached_conversion(path) if _may_be_published(path) else resolve_checkpoint(path)
    repository = _Repository.find(str(name), revision)
    if CONFIG_FILE not in repository.files and any(map(_is_of_weights, repository.files)):
        return cached_conversion(repository.fetch_published(), PUBLISHED_REPOSITORIES.get(str(name)))
    directory = repository.fetch([*CHECKPOINT_FILES, CARD_FILE])
    missing = [file for file in CHECKPOINT_FILES if not (directory / file).is_file()]
    if missing:
        raise UserError(
            f"{name}: the repository{_at(revision)} on the model hub has no {missing[0]}; a checkpoint has "
            f"{', '.join(CHECKPOINT_FILES)}"
        )
    return directory


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a name that no file can have
        raise UserError(f"{str(path)[:60]}...: no such checkpoint ({error.strerror}); check the name") from None


def _may_be_published(path: Path) -> bool:
    """Whether it is a file, or a directory with a weight file but neither a checkpoint of ours nor a run."""
    if not path.is_dir():
        return path.is_file()
    ours = (path / CONFIG_FILE).is_file() or any(read_latest(root) for root in (path, path / "checkpoints"))
    return not ours and any(_is_of_weights(file.name) for file in path.iterdir())


def _is_of_weights(name: str) -> bool:
    return name.endswith((*WEIGHT_SUFFIXES, INDEX_SUFFIX))


@dataclass(frozen=True)
class _Repository:
    """A repository of the Hub, or where that cannot be reached, what was fetched of it before."""

    name: str
    revision: str | None
    files: Sequence[str]
    """Names of those that it has."""
    local: bool
    """Whether the Hub could not be reached: then it is not asked again."""

    @classmethod
    def find(cls, name: str, revision: str | None) -> _Repository:
        """Raises UserError where there is no such repository, neither on the Hub nor in the cache."""
        from huggingface_hub import HfApi

        try:
            # Not list_repo_files(): that asks for half a minute, again and again, where there is no network.
            siblings = HfApi().model_info(name, revision=revision).siblings or []
            return cls(name, revision, [file.rfilename for file in siblings], local=False)
        except Exception as error:  # noqa: BLE001 - of huggingface_hub and of the HTTP library of its version
            try:
                # Without patterns it would insist on every file of the repository, those too that were never fetched.
                cached = HfApi().snapshot_download(name, revision=revision, allow_patterns=[], local_files_only=True)
            except Exception:  # noqa: BLE001
                raise _unreachable(name, revision, error) from None
            return cls(name, revision, [file.name for file in Path(cached).iterdir()], local=True)

    def fetch(self, files: Sequence[str]) -> Path:
        """The snapshot in the local cache, with those of `files` that it has."""
        from huggingface_hub import HfApi

        try:
            snapshot = HfApi().snapshot_download(
                self.name, revision=self.revision, allow_patterns=list(files), local_files_only=self.local
            )
            return Path(snapshot)
        except Exception as error:  # noqa: BLE001 - as above
            raise _unreachable(self.name, self.revision, error) from None

    def fetch_published(self) -> Path:
        """Its published weights, or the index of their shards, with what lies beside them."""
        beside = [CONFIG_JSON, VOCABULARY_FILE]
        weights = choose_weight_file(self.files, self.name)
        directory = self.fetch([weights, *beside])
        if weights.endswith(INDEX_SUFFIX):
            directory = self.fetch([weights, *beside, *shard_names(directory / weights)])
        return directory / weights


def _unreachable(name: str, revision: str | None, error: Exception) -> UserError:
    return UserError(
        f"{name}: no such directory, and no repository of that name{_at(revision)} could be fetched from the model "
        f"hub ({one_line(error)}); check the name, or run once where the hub can be reached"
    )


def upload_checkpoint(
    directory: str | Path, repo_id: str, private: bool | None = None, revision: str | None = None
) -> str:
    """Upload a checkpoint directory's own files (no optimizer state, nothing else in it) and return the commit's URL.

    The repository is made if need be, and the branch `revision`; the files arrive in one commit or not at all. Raises
    UserError for a directory that is no whole checkpoint, one that names its backbone by a path of this machine, and
    whatever the hub refuses."""
    directory = Path(directory)
    files = [file for file in (*CHECKPOINT_FILES, CARD_FILE) if (directory / file).is_file()]
    missing = [file for file in CHECKPOINT_FILES if file not in files]
    if missing:
        raise UserError(f"{directory / missing[0]}: no such file; a checkpoint has {', '.join(CHECKPOINT_FILES)}")
    backbone = read_config(directory).backbone
    for key, option in _NAMES_OF_BACKBONES.items():
        named = getattr(backbone, key)
        if Path(named).is_absolute() or is_relative_to_checkpoint(named):  # neither is uploaded with it
            raise UserError(
                f"{directory}: backbone.{key} is {named}, which nobody else has; export it under a "
                f"name that others can load (scripts/export_checkpoint.py {option} NAME)"
            )
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            allow_patterns=files,
            commit_message="Upload EDJE checkpoint",
            revision=revision,
        )
    except Exception as error:  # noqa: BLE001 - of huggingface_hub and of the HTTP library of its version
        raise UserError(
            f"{repo_id}: the model hub did not take the checkpoint ({one_line(error)}); nothing was committed. Check "
            "the name, and that you are logged in with the right to write"
        ) from None
    return str(commit.commit_url)


def _at(revision: str | None) -> str:
    return f" at revision {revision!r}" if revision is not None else ""
