"""What a reader of the method never has to open.

cli            the command line: one flat dataclass, errors in one line, exit codes
machine        device, precision, memory; what a run was made on
processes      the processes of a torchrun job
files          atomic writes; JSON and CSV
run_directory  a run's folder: settings, lock, what may be overwritten
jobs           trainings side by side, in processes of their own
signals        SIGTERM and SIGINT, which wait for the end of an update
checkpoint     a training that can be stopped and resumed
log            log.csv, TensorBoard, Weights & Biases, tables, seconds by phase
update_log     a student's log.csv
training       learning-rate schedule, seeds, CUDA graphs
environments   making environments, sizes of their spaces
spaces         observations of any space as vectors
isolation      reading files of others with bounded memory and time
minari_files   a Minari dataset as arrays: download, cache
host_table     data too large for the training device
hub            run directories on the Hugging Face Hub
onnx_teacher   any policy as a teacher: an ONNX file
verdict        whether a model does what it is asked for
collect        the built-in datasets, collected with the policies in behaviours/
"""


class UserError(ValueError):
    """A mistake that the user can mend: one line with the value and the remedy, exit code 2."""


def first_line(e: BaseException) -> str:
    """The first line of what an exception says, for a UserError's one line; empty where it says nothing."""
    return (str(e).strip().splitlines() or [""])[0]


def reason(e: BaseException) -> str:
    """`first_line`, or the exception's type where it says nothing; 200 characters of it."""
    return (first_line(e) or type(e).__name__)[:200]
