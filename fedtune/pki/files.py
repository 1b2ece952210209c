"""The private files of an authority and an enrolment: those of `fedtune.run.private_files`, with enrolment's errors."""

from __future__ import annotations

from fedtune.errors import EnrolmentError
from fedtune.run.private_files import PrivateFiles

_FILES = PrivateFiles(EnrolmentError, one_writer=True)
write_private, read_private, make_private_folder = _FILES.write, _FILES.read, _FILES.make_folder
locked, disk_errors = _FILES.locked, _FILES.disk_errors
