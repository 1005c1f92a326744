"""What a long run and its judges need beside the method. It stands on `regularizers`, `models` and `data`.

Each file imports only those above it, and no judge or pretrain.py.

    checkpoint  the safetensors files that stages pass on
    foreign     encoders in the files of other projects, and the weights that a run begins from
    state       how the state of a run is copied and restored, and when it is saved
    settings    flags checked, recipes applied: every setting with the value in force
    measure     what is measured beside loss and accuracy
    run         a run's folder, and how a run that was stopped goes on
    judging     what both judges share
"""
