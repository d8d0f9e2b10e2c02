"""`Interface`: what a transformation takes and gives."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Interface(NamedTuple):
    """What a stage takes and gives, for `chain` to check.

    Attributes:
      takes: "moments", "updates" (a plain tree), or "any".
      gives: "moments", "updates", or "same" as it took.
      rate: "applies" for the stage that multiplies by the learning rate, and turns ascent into
        descent; "before" or "after" for one that is right on that side of it only.
      bias: "corrects" for the stage that divides moments by their weights, "before" for one that
        still needs the weights.
      end: "rounds" for the stage whose updates must reach the parameters as they are, "reads" for
        one that leaves them so, and may stand behind it.
      moves: whether it moves parameters whose gradient is zero, as a decay and a moment do.
      skips: whether it gives zeros for a step that it does not take.
    """

    takes: Literal["moments", "updates", "any"] = "updates"
    gives: Literal["moments", "updates", "same"] = "updates"
    rate: Literal["applies", "before", "after"] | None = None
    bias: Literal["corrects", "before"] | None = None
    end: Literal["rounds", "reads"] | None = None
    moves: bool = False
    skips: bool = False

    @property
    def tracks(self) -> bool:
        """Whether it makes moments of gradients."""
        return self.gives == "moments" and self.takes != "moments"
