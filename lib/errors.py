"""The two errors that end a stage with one line on standard error in place of a traceback.

They have a file of their own because every other file, on every floor, may raise them.
"""


class InputError(ValueError):
    """Input that is at fault: a flag, a file, a data set, a checkpoint, the way processes were launched.

    Its message says what is wrong, then what to do. It ends a stage with exit code 2.
    """


class Stopped(Exception):
    """The end of a stage by a signal; its args: the reason, in words, and the exit code that a shell expects then."""
