"""Which files a run's folder holds, by what they are."""

from pathlib import Path


class RunFiles:
    """The paths in the folder of a run, whether or not it holds them already."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.provenance = path / "provenance.json"
        self.metrics = path / "metrics.jsonl"
        self.status = path / "status.json"
        self.log = path / "log.txt"
        self.tokenizer = path / "tokenizer.json"
        self.precision = path / "precision.json"
        self.experts = path / "experts.json"
        """Load and bias of every expert, as they were at a step."""
        self.rollouts = path / "rollouts"
        self.threshold = path / "threshold.json"
        """Where a corrector begins to take a token for wrong, as found on held-out pairs."""
        self.suites = path / "suites"
        """Answers to the tasks of suites."""
        self.checkpoints = path / "checkpoints"
        self.companions = path / "hf"
        """Small files that take the place of an export's own."""
        self.chat_template = self.companions / "chat_template.jinja"
        """There if the model has learned conversations."""
        self.ranks = path / "ranks"
        self.profile = path / "profile"

    @classmethod
    def around(cls, path: Path) -> "RunFiles | None":
        """Return those of a run, given its folder, its `checkpoints` folder or one checkpoint."""
        path = path.absolute()
        for folder in (path, path.parent, path.parent.parent):
            if (files := cls(folder)).checkpoints.is_dir():
                return files
        return None

    def log_of(self, rank: int) -> Path:
        """Return the log of a rank; the first one's is that of the run."""
        return self.log if rank == 0 else self.ranks / f"rank-{rank}.log"
