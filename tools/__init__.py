"""Programs beside the stages, run from the top of the repository as `python -m tools.NAME`.

figures      the paper's figures and tables, drawn from run folders (groups, logs, neighbours, table: its parts)
energy       the hyperspherical energy of every layer in a file of weights, or of two: before and after
embed        the features of a data set's images, with labels and paths, in one file for other programs
reproduce    the paper's runs on CIFAR-10, one after the other; paper_tables.csv has the paper's numbers
export       a trained encoder as a folder for the Hugging Face Hub, with its model card
bench        what each part costs beside what a user would otherwise use
fingerprint  the losses of six kinds of runs, compared with stored ones
notebook     the README's commands as a notebook, with their outputs
leaderboard  the tables of results/README.md, from the logs
"""
