"""The bench: a grid of victims and methods, one file per measurement, resumable."""

from unbackdoor._bench.store import VERSION as VERSION
from unbackdoor._bench.store import Store as Store
from unbackdoor._bench.store import identity as identity
