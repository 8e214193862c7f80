"""One choice of a Generate call: its tokens become text, until something stops it."""

from __future__ import annotations

from deltamux.frontend.detokenizer import Detokenizer, StopStrings
from deltamux.frontend.tokenizer import Prompt, Tokenizer
from deltamux.v1 import inference_pb2 as v1
from deltamux.wire.messages import Logprob, Progress, TokenLogprobs


class Choice:
    """Turns the progress of one choice into messages for the client."""

    def __init__(
        self, index: int, request: v1.GenerateRequest, prompt: Prompt, tokenizer: Tokenizer
    ) -> None:
        output, stopping = request.output, request.stopping
        skip_special = not output.HasField("skip_special_tokens") or output.skip_special_tokens
        self.index = index
        self.tokens = 0
        self.finished = False
        self._tokenizer = tokenizer
        self._min_tokens = stopping.min_tokens
        self._include_stop = stopping.include_stop
        self._return_token_ids = output.return_token_ids
        self._detokenizer = Detokenizer(tokenizer, prompt.token_ids, skip_special)
        self._stops = StopStrings(stopping.stop, stopping.include_stop)

    def take(self, progress: Progress) -> v1.GenerateResponse:
        """What these tokens add for the client; after a stop string, the rest is dropped."""
        before = self.tokens
        text, stop = self._read(progress)
        taken = slice(self.tokens - before)
        response = v1.GenerateResponse(index=self.index, text=text)
        if self._return_token_ids:
            response.token_ids.extend(progress.token_ids[taken])
        if progress.logprobs:
            response.logprobs.extend(map(self._logprobs, progress.logprobs[taken]))
        if stop is not None:
            self._finish(response, v1.Finish(reason=v1.Finish.REASON_STOP, stop=stop))
        elif progress.finish:
            self._end(response, progress)
        return response

    def cancel(self) -> v1.GenerateResponse:
        """The last message of a choice that was ended from outside."""
        response = v1.GenerateResponse(index=self.index)
        response.text = self._stops.flush()
        self._finish(response, v1.Finish(reason=v1.Finish.REASON_CANCELLED))
        return response

    def _read(self, progress: Progress) -> tuple[str, str | None]:
        """The text up to the first stop string, and that string; counts the tokens up to there."""
        shown = len(progress.token_ids)
        if progress.finish == "stop" and not self._include_stop:
            shown -= 1
        pieces = []
        for position, token_id in enumerate(progress.token_ids):
            self.tokens += 1
            text = self._detokenizer.push(token_id) if position < shown else ""
            # Stop strings are looked for behind the first `min_tokens` tokens.
            stop = None
            if self.tokens > self._min_tokens:
                text, stop = self._stops.push(text)
            pieces.append(text)
            if stop is not None:
                return "".join(pieces), stop
        return "".join(pieces), None

    def _end(self, response: v1.GenerateResponse, progress: Progress) -> None:
        """The engine has ended the choice: nothing is held back any longer."""
        if progress.finish == "length":
            # Half a character is half because of the limit: it is not shown.
            response.text += self._stops.flush()
            self._finish(response, v1.Finish(reason=v1.Finish.REASON_LENGTH))
            return
        response.text += self._stops.flush() + self._detokenizer.flush()
        finish = v1.Finish(reason=v1.Finish.REASON_STOP)
        if progress.token_ids:
            finish.stop_token_id = progress.token_ids[-1]
        self._finish(response, finish)

    def _finish(self, response: v1.GenerateResponse, finish: v1.Finish) -> None:
        response.finish.CopyFrom(finish)
        self.finished = True

    def _logprobs(self, token: TokenLogprobs) -> v1.TokenLogprobs:
        return v1.TokenLogprobs(
            chosen=self._candidate(token.chosen), top=map(self._candidate, token.top)
        )

    def _candidate(self, candidate: Logprob) -> v1.TokenLogprobs.Candidate:
        text = self._tokenizer.decode([candidate.token_id], skip_special_tokens=False)
        return v1.TokenLogprobs.Candidate(
            token_id=candidate.token_id, token=text, logprob=candidate.logprob
        )
