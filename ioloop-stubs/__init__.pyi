from asyncio import SelectorEventLoop
from builtins import TimeoutError as TimeoutError
from collections.abc import Awaitable, Callable
from concurrent.futures import Future as ConcurrentFuture
from datetime import timedelta
from types import FrameType, TracebackType
from typing import (
    Any,
    Final,
    Literal,
    ParamSpec,
    Protocol,
    SupportsFloat,
    SupportsIndex,
    TypeAlias,
    TypedDict,
    TypeVar,
    final,
    overload,
    type_check_only,
)

from typing_extensions import Self, disjoint_base

__all__ = ["IOLoop", "PeriodicCallback", "TimeoutError", "new_event_loop"]

__version__: Final[str]

@type_check_only
class _HasFileno(Protocol):
    def fileno(self) -> int: ...

# A future: of asyncio, of concurrent.futures, or any object with these two methods.
@type_check_only
class _FutureLike(Protocol[_T_co]):
    def add_done_callback(self, fn: Callable[[Any], object], /) -> object: ...
    def result(self) -> _T_co: ...

# A poller for IOLoop(impl=...) other than the module's own, such as select.epoll().
@type_check_only
class _PollerLike(Protocol):
    def register(self, fd: int, eventmask: int, /) -> object: ...
    def modify(self, fd: int, eventmask: int, /) -> object: ...
    def unregister(self, fd: int, /) -> object: ...
    def poll(self, timeout: float, /) -> list[tuple[int, int]]: ...

@type_check_only
class _Stats(TypedDict):
    iterations: int
    polls: int
    events: int
    callbacks: int
    timeouts: int
    pending_callbacks: int
    pending_timeouts: int
    handlers: int
    asleep: float
    longest_busy: float

_P = ParamSpec("_P")
_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)
_Fd: TypeAlias = int | _HasFileno
_FdT = TypeVar("_FdT", bound=_Fd)
_FutureT = TypeVar("_FutureT", bound=_FutureLike[Any] | ConcurrentFuture[Any])
_Seconds: TypeAlias = SupportsFloat | SupportsIndex
_Deadline: TypeAlias = _Seconds | timedelta

# The other face of an IOLoop.
@type_check_only
class _EventLoop(SelectorEventLoop):
    @property
    def ioloop(self) -> IOLoop: ...

def new_event_loop() -> _EventLoop: ...

@disjoint_base
class IOLoop:
    NONE: Final = 0
    READ: Final = 0x001
    WRITE: Final = 0x004
    ERROR: Final = 0x018
    _EPOLLIN: Final = 0x001
    _EPOLLPRI: Final = 0x002
    _EPOLLOUT: Final = 0x004
    _EPOLLERR: Final = 0x008
    _EPOLLHUP: Final = 0x010
    _EPOLLRDHUP: Final = 0x2000
    _EPOLLONESHOT: Final = 0x40000000
    _EPOLLET: Final = 0x80000000

    def __init__(
        self,
        impl: _PollerLike | None = None,
        *,
        time_func: Callable[[], float] | None = None,
        make_current: bool | None = None,
    ) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

    # Which loop
    @classmethod
    def instance(cls) -> IOLoop: ...
    @staticmethod
    def initialized() -> bool: ...
    @staticmethod
    def clear_instance() -> None: ...
    def install(self) -> None: ...
    @overload
    @staticmethod
    def current(instance: Literal[True] = True) -> IOLoop: ...
    @overload
    @staticmethod
    def current(instance: bool) -> IOLoop | None: ...
    def make_current(self) -> None: ...
    @staticmethod
    def clear_current() -> None: ...

    # Life
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def running(self) -> bool: ...
    @overload
    def run_sync(
        self, func: Callable[[], Awaitable[_T]], timeout: _Seconds | None = None
    ) -> _T: ...
    @overload
    def run_sync(
        self, func: Callable[[], _FutureLike[_T]], timeout: _Seconds | None = None
    ) -> _T: ...
    @overload
    def run_sync(
        self, func: Callable[[], _T], timeout: _Seconds | None = None
    ) -> _T: ...
    def run_once(self, timeout: _Seconds | None = None) -> None: ...
    def next_timeout(self) -> float | None: ...
    def fileno(self) -> int: ...
    def reinit(self) -> None: ...
    def close(self, all_fds: bool = False) -> None: ...

    # Handlers
    def add_handler(
        self, fd: _FdT, handler: Callable[[_FdT, int], object], events: int
    ) -> None: ...
    def update_handler(self, fd: _Fd, events: int) -> None: ...
    def remove_handler(self, fd: _Fd) -> None: ...
    @staticmethod
    def split_fd(fd: _FdT) -> tuple[int, _FdT]: ...
    @staticmethod
    def close_fd(fd: _Fd) -> None: ...

    # Callbacks
    def add_callback(
        self, callback: Callable[_P, object], *args: _P.args, **kwargs: _P.kwargs
    ) -> None: ...
    def add_callback_from_signal(
        self, callback: Callable[_P, object], *args: _P.args, **kwargs: _P.kwargs
    ) -> None: ...
    def spawn_callback(
        self, callback: Callable[_P, object], *args: _P.args, **kwargs: _P.kwargs
    ) -> None: ...
    @property
    def asyncio_loop(self) -> _EventLoop: ...
    def add_future(
        self, future: _FutureT, callback: Callable[[_FutureT], object]
    ) -> None: ...
    def handle_callback_exception(self, callback: Callable[..., object]) -> None: ...

    # Timeouts
    def time(self) -> float: ...
    def add_timeout(
        self,
        deadline: _Deadline,
        callback: Callable[_P, object],
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _Timeout: ...
    def call_later(
        self,
        delay: _Seconds,
        callback: Callable[_P, object],
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _Timeout: ...
    def call_at(
        self,
        when: _Deadline,
        callback: Callable[_P, object],
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _Timeout: ...
    def remove_timeout(self, timeout: _Timeout) -> None: ...

    # Watching the loop itself
    def set_blocking_signal_threshold(
        self,
        seconds: _Seconds | None,
        action: Callable[[int, FrameType | None], object] | None,
    ) -> None: ...
    def set_blocking_log_threshold(self, seconds: _Seconds | None) -> None: ...
    def log_stack(self, signal: int, frame: FrameType | None) -> None: ...
    def stats(self) -> _Stats: ...

@disjoint_base
class PeriodicCallback:
    def __init__(
        self,
        callback: Callable[[], object],
        callback_time: _Deadline,
        io_loop: IOLoop | None = None,
        jitter: float = 0,
    ) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def is_running(self) -> bool: ...
    callback: Callable[[], object]
    @property
    def callback_time(self) -> float: ...
    @callback_time.setter
    def callback_time(self, period: _Deadline) -> None: ...
    @property
    def jitter(self) -> float: ...
    @property
    def io_loop(self) -> IOLoop: ...

# What add_timeout(), call_later() and call_at() return.  It can't be made directly.
@final
class _Timeout:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    @property
    def deadline(self) -> float: ...
    @property
    def callback(self) -> Callable[..., object] | None: ...
    def cancel(self) -> None: ...

# The module's own pollers, for IOLoop(impl=...).  All three exist on every platform;
# making one that the kernel does not have raises OSError.
@disjoint_base
class _Poller:
    def register(self, fd: int, events: int) -> None: ...
    def modify(self, fd: int, events: int) -> None: ...
    def unregister(self, fd: int) -> None: ...
    def poll(self, timeout: float = -1) -> list[tuple[int, int]]: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...

@disjoint_base
class _EPoll(_Poller): ...

@disjoint_base
class _KQueue(_Poller): ...

@disjoint_base
class _Select(_Poller): ...

_poll: type[_EPoll | _KQueue | _Select]

def _verify(loop: IOLoop) -> None: ...
