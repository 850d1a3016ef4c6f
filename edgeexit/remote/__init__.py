"""
Boards seen from the laptop: which there are, a link to one of them, work on many at once.

Needs the extra `ssh` (asyncssh, tomlkit); only the command line imports this package, and late.
"""
