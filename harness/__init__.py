"""What the six pages stand on. No paper speaks of it, and no reader of the method needs it.

The first floor imports no page:

    errors      the two errors that end a stage with one line
    files       the names of a run's files, and files that appear whole or not at all
    formats     tensors out of a file of any project, whatever its name
    streams     standard output and standard error, whatever they are
    cli         flags: the command line is checked against a stage's signature, then Fire calls the stage
    log         rows out to metrics.jsonl and back
    saving      when a run saves, and the thread that writes
    processes   what is different where several processes run one program
    augment     crop, colour, blur: operations on whole batches of images
    encoders    networks by name: timm's ResNets and an AlexNet
    pictures    pictures in files: which there are, how one is read, many of them read ahead by workers
    norms       BatchNorm of two views over all processes
    surveys     what pictures are like, kept from one start to the next
    neighbours  the nearest rows of a large bank, which passes in parts, divided over processes
    sources     the embedded photographs, torchvision's data sets, folders of pictures

The second floor builds on the pages:

    settings    flags checked, recipes applied: every setting with the value in force
    checkpoint  the safetensors files that stages pass on
    foreign     encoders in the files of other projects
    judging     what both judges open
    probes      what is measured while a network trains
    initial     the weights that a run begins from
    run         a run's folder, and how a run that was stopped goes on

Imports go one way: tools and stages import pages and both floors; `data` and `models` import the first floor alone;
`regularizers` imports torch alone. tests/test_layout.py holds this.
"""
