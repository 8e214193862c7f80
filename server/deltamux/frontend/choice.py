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
        response = v1.GenerateResponse(index=self.index)
        for position, token_id in enumerate(progress.token_ids):
            self._record(response, progress, position)
            ended = progress.finish == "stop" and position == len(progress.token_ids) - 1
            shown = not ended or self._include_stop
            text, stop = self._text(self._detokenizer.push(token_id) if shown else "")
            response.text += text
            if stop is not None:
                self._finish(response, v1.Finish(reason=v1.Finish.REASON_STOP, stop=stop))
                return response
        if progress.finish:
            self._end(response, progress)
        return response

    def cancel(self) -> v1.GenerateResponse:
        """The last message of a choice that was ended from outside."""
        response = v1.GenerateResponse(index=self.index)
        response.text = self._stops.flush()
        self._finish(response, v1.Finish(reason=v1.Finish.REASON_CANCELLED))
        return response

    def _record(self, response: v1.GenerateResponse, progress: Progress, position: int) -> None:
        self.tokens += 1
        if self._return_token_ids:
            response.token_ids.append(progress.token_ids[position])
        if progress.logprobs:
            response.logprobs.append(self._logprobs(progress.logprobs[position]))

    def _text(self, text: str) -> tuple[str, str | None]:
        """Stop strings are looked for behind the first `min_tokens` tokens."""
        return (text, None) if self.tokens < self._min_tokens else self._stops.push(text)

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
