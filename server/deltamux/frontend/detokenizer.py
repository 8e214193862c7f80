"""Token ids to text as they come: whole characters, and no beginning of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from deltamux.frontend.tokenizer import Tokenizer

# Tokens that the next one is decoded behind: enough to know its spacing.
CONTEXT = 6
# Tokens that may become context before it is cut: then a token costs one decoding, seldom two.
LONGEST = 12
# A character has at most 4 bytes and a token at least one: what is incomplete, three more
# tokens may complete. Older bytes that make no character by then never will.
PATIENCE = 3
INCOMPLETE = "\ufffd"


class Detokenizer:
    """The text of one choice, token by token."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # The window that is decoded; its first `_shown` ids are `_text`, which is out already.
        self._window = self._context(prompt)
        self._shown = len(self._window)
        self._text = self._decode(self._window)
        # Where the window may begin later: at the end of something shown, so that it begins with no
        # half character. Beside one, some tokenizers can read no other bytes either.
        self._start = self._shown

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty in the middle of a character."""
        if self._skip_special_tokens and token_id in self._tokenizer.special_ids:
            return ""  # it has no bytes: those before it still wait for theirs
        self._window.append(token_id)
        end, text = len(self._window), self._decode(self._window)
        if text.endswith(INCOMPLETE):
            end -= PATIENCE
            if end <= self._shown:
                return ""
            whole, text = text, self._decode(self._window[:end])
            if not whole.startswith(text):
                return ""  # it ends in the middle of a character that is complete by now
        return self._show(end, text)

    def flush(self) -> str:
        """What the model left incomplete, with replacement characters."""
        return self._show(len(self._window), self._decode(self._window))

    def _show(self, end: int, text: str) -> str:
        """What is new in `text`, that of the first `end` ids."""
        new = text[len(self._text) :]
        if end > LONGEST and end - self._start >= CONTEXT:
            del self._window[: self._start]
            end -= self._start
            text, self._start = self._decode(self._window[:end]), end
        elif end <= CONTEXT:
            self._start = end
        self._shown, self._text = end, text
        return new

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The prompt's last ids, some more where the first of them would be part of a character."""
        for count in range(CONTEXT, CONTEXT + PATIENCE):
            window = list(prompt[-count:])
            if not self._decode(window).startswith(INCOMPLETE):
                return window
        return list(prompt[-CONTEXT - PATIENCE :])

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)


class StopStrings:
    """Finds the first stop string in a text that arrives in pieces."""

    def __init__(self, stops: Sequence[str], include_stop: bool) -> None:
        self._stops = tuple(stops)
        self._include_stop = include_stop
        # Not shown yet, because a stop string may begin in it.
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that can be shown, and the stop string that was found, which ends it."""
        if not self._stops:
            return text, None
        self._held += text
        found = [(self._held.find(stop), stop) for stop in self._stops]
        # The one that ends first, so that the answer does not depend on how the text is cut.
        ends = [(start + len(stop), -len(stop), stop) for start, stop in found if start >= 0]
        if ends:
            end, _, stop = min(ends)
            shown = self._held[: end if self._include_stop else end - len(stop)]
            self._held = ""
            return shown, stop
        keep = self._possible_start()
        shown, self._held = self._held[:keep], self._held[keep:]
        return shown, None

    def flush(self) -> str:
        """What was held back and no stop string has claimed."""
        shown, self._held = self._held, ""
        return shown

    def _possible_start(self) -> int:
        """Where the longest end of the text begins that is the beginning of a stop string."""
        longest = max(map(len, self._stops))
        for start in range(max(0, len(self._held) - longest + 1), len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self._stops):
                return start
        return len(self._held)
