"""A mistake of the user's, answered with one sentence and exit code 2. Everything else that goes wrong is a bug and crashes loudly."""


class ProblemError(Exception):
    """What is wrong, where, and what to do, as one sentence for a person. The CLI prints it and exits with `code`."""

    def __init__(self, sentence: str, code: int = 2) -> None:
        super().__init__(sentence)
        self.code = code
