"""Processes that end with the one that started them, also where that is killed and can end nothing itself."""

from __future__ import annotations

import shutil

__all__ = ["WITH_PARENT"]

_SETPRIV = shutil.which("setpriv")

#: The start of a command line; where util-linux is missing, the process is left behind. To the kernel the
#: parent is the thread that starts it, so that must not be one of a pool, whose threads may end before.
WITH_PARENT = (_SETPRIV, "--pdeathsig", "KILL") if _SETPRIV else ()
