"""The run folder: the one interface between training and reporting. The contents page."""

from rdrop.experiments.run_folder.folder import FAILURE as FAILURE
from rdrop.experiments.run_folder.folder import FORMAT as FORMAT
from rdrop.experiments.run_folder.folder import METRICS as METRICS
from rdrop.experiments.run_folder.folder import RECIPE as RECIPE
from rdrop.experiments.run_folder.folder import RESULT as RESULT
from rdrop.experiments.run_folder.folder import TUNING as TUNING
from rdrop.experiments.run_folder.folder import ResultsError as ResultsError
from rdrop.experiments.run_folder.folder import RunFolder as RunFolder
from rdrop.experiments.run_folder.folder import RunRecord as RunRecord
from rdrop.experiments.run_folder.folder import RunTakenOverWarning as RunTakenOverWarning
from rdrop.experiments.run_folder.folder import StorageError as StorageError
from rdrop.experiments.run_folder.folder import append_synced as append_synced
from rdrop.experiments.run_folder.folder import explain_failed_write as explain_failed_write
from rdrop.experiments.run_folder.folder import find_runs as find_runs
from rdrop.experiments.run_folder.folder import read_file as read_file
from rdrop.experiments.run_folder.folder import remedy as remedy
from rdrop.experiments.run_folder.folder import sync_folder as sync_folder
from rdrop.experiments.run_folder.folder import write_atomically as write_atomically
from rdrop.experiments.run_folder.folder import write_synced as write_synced
from rdrop.experiments.run_folder.lock import LockLostError as LockLostError
from rdrop.experiments.run_folder.lock import RunLockedError as RunLockedError
from rdrop.experiments.run_folder.lock import holder_of as holder_of
from rdrop.experiments.run_folder.whole import read_result as read_result
from rdrop.experiments.run_folder.whole import what_is_damaged as what_is_damaged
from rdrop.experiments.run_folder.whole import what_is_damaged_in_result as what_is_damaged_in_result
from rdrop.experiments.run_folder.whole import what_is_damaged_in_state as what_is_damaged_in_state
