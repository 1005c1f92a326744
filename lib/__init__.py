"""What imports no page: pictures and augmentations, encoders, norms, rivals, files, processes, the command line.

Each file imports only those above it.

    augment     crop, colour, blur: operations on whole batches of images
    norms       BatchNorm of two views over all processes
    rivals      regularizers of others: orthogonality of neurons, KoLeo and SIGReg of projections
    errors      the two errors that end a stage with one line
    files       the names of a run's files, and files that appear whole or not at all
    log         rows out to metrics.jsonl and back
    processes   what is different where several processes run one program
    cli         flags and exit codes: a stage is called with the values that its signature allows
    encoders    networks by name: timm's ResNets and ViTs, and an AlexNet
    tensors     tensors out of a file of any project, whatever its name
    nearest     the nearest rows of a large bank, which passes in parts, divided over processes
    pictures    pictures in files: which there are, how one is read, many of them read ahead by workers
    sources     the embedded photographs, torchvision's data sets, folders of pictures

You can copy `augment` (torch, torchvision, numpy), `norms` and `rivals` (torch) alone, as `regularizers.py`.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"Python 3.11 or later is needed, and this is {sys.version.split()[0]}")
