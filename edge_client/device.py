"""The life of one device, as steps between journal entries.

    consent -> enrol -> check in -> lease -> train -> store the frame -> send -> receipt -> check in ...

Each step begins from what the journal says and ends with one entry, so a crash at any point repeats a
step and never more: a lease is not trained again once its frame is stored, and only those bytes are sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

from edge_client import events
from edge_client.activations import Activations
from edge_client.aside import Aside, beside
from edge_client.backoff import Backoff
from edge_client.batches import address
from edge_client.bundle_cache import Bundles
from edge_client.conditions import Conditions, Holding, Watch, while_holding
from edge_client.device_config import DeviceConfig
from edge_client.events import Observer, Step
from edge_client.examples import Examples
from edge_client.journal import Idle, Journal, Leased, Trained
from edge_client.label_counts import secure_uniform
from edge_client.leased_work import LeasedWork, LeaseOverError
from edge_client.local_training import LocalTraining
from edge_client.trainer import Trainer
from edge_client.version_cache import MemoryVersions, VersionCache
from fedtt.errors import (
    BundleError,
    ConfigError,
    DataError,
    Declined,
    DiskFullError,
    FedttError,
    ForeignWork,
    LayoutError,
    Refused,
    RuntimeFailure,
    UnavailableError,
    Unreachable,
    WireError,
)
from fedtt.messages import (
    CheckIn,
    CheckInAnswer,
    Code,
    Enroll,
    Failure,
    FailureCode,
    Judge,
    Retired,
    Tell,
    Wait,
    Work,
    device_id,
)
from fedtt.seams import Clock, SystemClock, Transport
from fedtt.wire import update_digest

__all__ = ["Device"]

#: Refusals that may pass; any other answer to an upload is final.
_PASSING = {Code.BUSY, Code.TOO_MANY, Code.INTERNAL, Code.CLOCK_SKEW, Code.BAD_SIGNATURE, Code.UNKNOWN_DEVICE}

_LONGEST_PAUSE_S = 86400.0  #: that a server may ask for

#: What a failed training is called towards the server; DataError and the like may quote private data.
_FAILURES: dict[type[FedttError], FailureCode] = {
    BundleError: FailureCode.BUNDLE,
    DataError: FailureCode.NO_EXAMPLES,
    LayoutError: FailureCode.BUNDLE,
    RuntimeFailure: FailureCode.RUNTIME,
    WireError: FailureCode.NOT_FINITE,
}


class Device:
    """One device of one server; `journal` belongs to a home whose lock the caller holds."""

    def __init__(
        self,
        config: DeviceConfig,
        *,
        public_key: bytes,
        journal: Journal,
        transport: Transport,
        examples: Examples,
        bundles: Bundles,
        trainer: Trainer,
        versions: VersionCache | None = None,
        activations: Activations | None = None,
        conditions: Conditions | None = None,
        clock: Clock | None = None,
        observe: Observer = events.ignore,
        uniform: Callable[[], float] = secure_uniform,
        aside: Aside = beside,
        hold: Holding = while_holding,
    ) -> None:
        """versions: where those downloaded are kept for the next difference; None keeps them in memory.

        activations: where what frozen blocks give is kept; None computes it at each step.

        conditions: where battery, network and the like are read; None leaves them out of account.

        uniform: where the noise on counts of labels comes from; numbers in [0, 1) that nobody can guess.
        aside: how files and databases are waited for, so that the app's event loop is not held up.
        hold: how work is done while the conditions hold.
        """
        self.config, self.journal = config, journal
        self._public_key, self._name = public_key, device_id(public_key)
        self._transport, self._examples = transport, examples
        self._runtime_names = (trainer.runtime,)
        self._is_new = False  #: to the server, as far as this run of the client knows
        self._clock, self._observe, self._aside = clock or SystemClock(), observe, aside
        self._watch = Watch(conditions, config.limits, config.watch_s, aside, hold)
        training = LocalTraining(
            self._name,
            transport,
            examples,
            bundles,
            versions or MemoryVersions(),
            trainer,
            activations,
            aside,
        )
        self._work = LeasedWork(config, journal, training, examples, self._watch, self._clock, uniform, aside)
        self._backoff = Backoff(
            device=address(self._name),
            seed=config.seed,
            first_s=config.retry_first_s,
            limit_s=config.retry_limit_s,
        )

    async def consent(self) -> None:
        """Record that the owner of this device has said yes; without it no step is taken."""
        if self.journal.state.consented_at is None:
            await self._aside(self.journal.update, consented_at=self._clock.now())

    async def run(self, until: Callable[[Step], bool] = lambda _: False) -> Step:
        """Take steps until the server retires this device or `until` says so of a step; returns that one.

        Cancelling it is safe at any time: training and judging stop at their next pass, and the journal holds
        the rest.
        """
        while True:
            step = await self.step()
            if type(step) is events.Retired or until(step):
                return step
            if step.pause_s > 0:
                await self._clock.sleep(step.pause_s)

    async def step(self) -> Step:
        """Take one step and say what came of it.

        Raises ConfigError without consent or a token to enrol with, Refused where the token is not taken,
        StorageError where the journal or the examples cannot be used, unless that may pass (no room, no open
        files); anything else that fails becomes an event.
        """
        if self.journal.state.consented_at is None:
            raise ConfigError("consent", None, "the owner of this device must agree before it takes part")
        try:
            step = await self._advance()
        except (DiskFullError, UnavailableError, Unreachable, WireError) as error:
            step = events.Retrying(error=str(error), pause_s=self._backoff.failed())
        except Refused as error:
            step = await self._retry_refused(error)
        self._observe(step)
        return step

    async def _advance(self) -> Step:
        state = self.journal.state
        if not state.enrolled:
            return await self._enroll()
        match state.phase:
            case Idle():
                why = await self._watch.against_work()
                return self._resting(why) if why else await self._check_in()
            case Leased() as leased:
                return await self._fulfil(leased)
            case Trained() as trained:
                why = await self._watch.against_traffic()
                return self._resting(why) if why else await self._send(trained)
            case _ as unreachable:
                assert_never(unreachable)

    def _resting(self, why: str) -> Step:
        return events.Resting(reason=why, pause_s=self.config.rest_s)

    async def _retry_refused(self, error: Refused) -> Step:
        code = error.problem.code
        if code is Code.BAD_TOKEN:
            raise error if self.config.token else _no_token() from None
        if code is Code.REVOKED:
            await self._aside(self.journal.update, enrolled=False)
            return events.Retired(reason=error.problem.detail)
        if code is Code.UNKNOWN_DEVICE:
            await self._aside(self.journal.update, enrolled=False)
        at_least_s = min(error.retry_after_s or 0.0, _LONGEST_PAUSE_S)
        return events.Retrying(error=str(error), pause_s=self._backoff.failed(at_least_s))

    async def _enroll(self) -> Step:
        """Enrol, without a token where the server may know this key: it takes a known one for nothing."""
        if not (self.config.token or self.journal.state.device):
            raise _no_token()
        await self._aside(self.journal.update, device=self._name)  # from here on the server may know it
        enrolled = await self._transport.enroll(
            Enroll(public_key=self._public_key, token=self.config.token, client=self.config.client)
        )
        if enrolled.device != self._name:
            raise WireError("the server enrolled this device under a name that is not its key's")
        await self._trust(enrolled.release_key)
        await self._aside(self.journal.update, enrolled=True)
        self._is_new = True
        return events.Enrolled(device=enrolled.device)

    async def _trust(self, release_key: bytes | None) -> None:
        """Keep the first release key that a server names; raises WireError where it names another later."""
        trusted = self.journal.state.release_key
        if release_key and not trusted:
            await self._aside(self.journal.update, release_key=release_key)
        elif release_key and release_key != trusted:
            raise WireError(
                f"the server's release key is {release_key.hex()}, this device trusts {trusted.hex()}: "
                "is it the right server?"
            )

    async def _check_in(self) -> Step:
        facts = CheckIn(
            client=self.config.client,
            runtimes=self._runtime_names,
            examples=await self._aside(self._examples.count),
            memory_mb=self.config.memory_mb,
            judges=self.config.judges,
        )
        try:
            answer = await self._ask(facts)
        except ForeignWork as error:
            return await self._give_up(error.lease, FailureCode.OTHER, str(error))
        match answer:
            case Work():
                return await self._take(answer)
            case Wait():
                pause_s = self._backoff.asked(min(answer.retry_after_s, _LONGEST_PAUSE_S))
                return events.Waiting(reason=answer.reason, pause_s=pause_s)
            case Retired():
                await self._aside(self.journal.update, enrolled=False)
                return events.Retired(reason=answer.reason)
            case Judge():
                return await self._judge(answer)
            case Tell():
                raise WireError("the server asks for what this device has just told it")
            case _ as unreachable:
                assert_never(unreachable)

    async def _ask(self, facts: CheckIn) -> CheckInAnswer:
        """Ask for work, with all the facts only where the server keeps others; one of before finds the short
        form malformed.
        """
        if not self._is_new:
            try:
                answer = await self._transport.check_in(facts.as_told())
                if type(answer) is not Tell:
                    return answer
            except Refused as error:
                if error.problem.code is not Code.MALFORMED:
                    raise
        answer = await self._transport.check_in(facts)
        self._is_new = False
        return answer

    async def _take(self, work: Work) -> Step:
        if work.lease == self.journal.state.finished_lease:
            return await self._give_up(work.lease, FailureCode.OTHER, "this lease has come to its end before")
        now = self._clock.now()
        plan, leased = work.plan, Leased(work=work, expires_at=now + work.expires_in_s)
        if not self.journal.state.release_key:
            await self._aside(self.journal.update, phase=leased)
        else:
            ends_at = None if work.round_ends_in_s is None else now + work.round_ends_in_s
            if why := await self._aside(self.journal.begin, plan.task, plan.round, ends_at, leased, now):
                return await self._give_up(work.lease, FailureCode.OTHER, why)
        return events.Granted(
            lease=work.lease, task=plan.task, round=plan.round, version_number=plan.version_number
        )

    async def _judge(self, question: Judge) -> Step:
        """Answer at once: a question that a crash cuts short is asked again, and its crashes are counted."""
        if (cut_short := self._work.cut_short(question)) >= self.config.max_attempts:
            why = f"judging was cut short {cut_short} times"
            return await self._give_up(question.lease, FailureCode.OTHER, why)
        try:
            verdict = await self._watch.holding(lambda: self._work.judge(question))
        except LeaseOverError as error:
            return self._dropped(question.lease, str(error))
        except (BundleError, DataError, Declined, LayoutError, RuntimeFailure, WireError) as error:
            return await self._give_up(question.lease, _failure(error), str(error))
        try:
            await self._transport.judge(question.lease, verdict)
        except Refused as error:
            if error.problem.code in _PASSING:
                raise
            return self._dropped(question.lease, str(error))
        return events.Judged(
            task=question.task,
            version_number=question.version_number,
            examples=verdict.examples,
            loss_before=verdict.before.loss,
            loss=verdict.after.loss,
            pause_s=self._backoff.fruitless(),
        )

    # training

    async def _fulfil(self, leased: Leased) -> Step:
        lease = leased.work.lease
        if self._clock.now() >= leased.expires_at:
            await self._aside(self.journal.drop, lease)
            return self._dropped(lease, "the lease expired before it was trained")
        if leased.attempts >= self.config.max_attempts:
            why = f"training was cut short {leased.attempts} times"
            return await self._give_up(lease, FailureCode.OTHER, why)
        try:
            return await self._watch.holding(lambda: self._work.train(leased))
        except LeaseOverError as error:
            await self._aside(self.journal.drop, lease)
            return self._dropped(lease, str(error))
        except (BundleError, DataError, Declined, LayoutError, RuntimeFailure, WireError) as error:
            if isinstance(self.journal.state.phase, Trained):  # the conditions broke just behind its end
                return events.Resting(reason=str(error))
            return await self._give_up(lease, _failure(error), str(error))

    async def _give_up(self, lease: str, code: FailureCode, detail: str) -> Step:
        """Give a lease back, if the server can be told; it expires by itself where not."""
        try:
            await self._transport.fail(lease, Failure(code=code))
        except (Refused, Unreachable, WireError):
            detail += " (the server could not be told)"
        await self._aside(self.journal.drop, lease)
        return events.GaveUp(lease=lease, code=code, detail=detail, pause_s=self._backoff.fruitless())

    def _dropped(self, lease: str, reason: str) -> Step:
        return events.Dropped(lease=lease, reason=reason, pause_s=self._backoff.fruitless())

    # sending

    async def _send(self, trained: Trained) -> Step:
        try:
            receipt = await self._transport.upload(trained.lease, trained.frame)
        except Refused as error:
            if error.problem.code in _PASSING:
                raise
            await self._aside(self.journal.drop, trained.lease)
            return self._dropped(trained.lease, str(error))
        digest = await self._aside(update_digest, trained.frame)
        if (receipt.lease, receipt.digest) != (trained.lease, digest):
            raise WireError("the receipt is for another update than the one sent")
        await self._aside(self.journal.commit, receipt)
        self._backoff.succeeded()
        return events.Acknowledged(receipt=receipt)


def _failure(error: FedttError) -> FailureCode:
    return FailureCode(error.of) if isinstance(error, Declined) else _FAILURES[type(error)]


def _no_token() -> ConfigError:
    return ConfigError("token", "", "an enrolment token from whoever runs the server")
