"""How a saved model gets to the Hub: what was written, in one commit, with its card and without what it replaces."""

import contextlib
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError


CARD = "README.md"
# What transformers looks for, the single file first: one that a sharded save leaves behind would be loaded instead.
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def now_in(folder: str | Path) -> int:
    """The time in nanoseconds by the clock, and as coarsely, as the folder's files get it when they are written."""
    with tempfile.NamedTemporaryFile(dir=folder) as probe:
        return Path(probe.name).stat().st_mtime_ns


def written_since(folder: str | Path, begun: int) -> list[str]:
    """Paths, relative to the folder, of the files in it that were written at or after a time of `now_in`."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files if path.stat().st_mtime_ns >= begun)


def remove_replaced_weights(folder: str | Path, begun: int) -> None:
    """Delete what an earlier save with another number of shards left: it would be loaded in place of the new weights."""
    present = {path.name for path in Path(folder).iterdir() if WEIGHTS.fullmatch(path.name)}
    new = present.intersection(written_since(folder, begun))
    for name in present - new if new else ():
        (Path(folder) / name).unlink()


@dataclass
class Upload:
    """
    One push to the Hub: `prepare` before the folder is written, `send` afterwards.

    Args:
        repo_id: `owner/name`, or a name under the user's own; made if it does not exist.
        private: as it is made; by default as the owner's settings say.
        token: by default the one that is stored.
        revision: a branch, made from `main` if it does not exist.
        create_pr: open a pull request instead of committing.
        tags: added to those of the card, also of one written by hand.
    """

    repo_id: str
    commit_message: str | None = None
    commit_description: str | None = None
    private: bool | None = None
    token: str | bool | None = None
    revision: str | None = None
    create_pr: bool = False
    tags: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.tags = [self.tags] if isinstance(self.tags, str) else list(self.tags or ())
        self.api = HfApi(token=self.token)
        self.remote_card: Path | None = None

    def prepare(self) -> None:
        """Make the repository and the branch, and fetch the card that stands there."""
        self.repo_id = self.api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
        if self.revision is not None and not self.create_pr and not self.revision.startswith("refs/pr/"):
            self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
        with contextlib.suppress(EntryNotFoundError, RevisionNotFoundError):
            self.remote_card = Path(self.api.hf_hub_download(self.repo_id, CARD, revision=self.revision))

    def copy_remote_card(self, folder: str | Path) -> None:
        """Put the card that stands on the Hub into a folder that has none."""
        if self.remote_card is not None and not (Path(folder) / CARD).exists():
            shutil.copyfile(self.remote_card, Path(folder) / CARD)

    def send(self, folder: str | Path, files: list[str], keep_remote_card: bool) -> CommitInfo:
        """
        Commit files of a folder.

        Args:
            files: relative to the folder.
            keep_remote_card: leave the text of the card that stands there; the folder's own is not sent.
        """
        local_card = Path(folder) / CARD
        if self.remote_card is not None and keep_remote_card:
            text = self.remote_card.read_text(encoding="utf-8")
        elif local_card.is_file():
            text = local_card.read_text(encoding="utf-8")
        else:
            text = f"---\n{ModelCardData(library_name='transformers')}\n---\n\n# {self.repo_id.rpartition('/')[2]}\n"
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path_in_repo=file, path_or_fileobj=str(Path(folder) / file))
            for file in files
            if file != CARD
        ]
        operations.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=self._with_tags(text).encode()))
        if any(WEIGHTS.fullmatch(file) for file in files):
            there = self.api.list_repo_files(self.repo_id, revision=self.revision)
            replaced = [file for file in there if WEIGHTS.fullmatch(file) and file not in files]
            operations += [CommitOperationDelete(path_in_repo=file) for file in replaced]
        return self.api.create_commit(
            self.repo_id,
            operations,
            commit_message=self.commit_message or "Upload model",
            commit_description=self.commit_description,
            revision=self.revision,
            create_pr=self.create_pr,
        )

    def _with_tags(self, text: str) -> str:
        card = ModelCard(text)
        present = card.data.tags or []
        missing = [tag for tag in self.tags if tag not in present]
        if not missing:
            # Written anew, the metadata of a card by hand would lose its comments and its form.
            return text
        card.data.tags = [*present, *missing]
        return str(card)
