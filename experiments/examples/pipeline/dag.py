"""The pipeline of the Makefile beside this file as an Airflow DAG, for Airflow 3.

Copy it into the folder of DAGs, and set the variables below. All tasks run where the package is
installed, and see one folder of runs. A task that is repeated goes on or changes nothing: the run
and the date are those of the schedule, not of the clock.
"""

import datetime

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

CONFIG = "my_log"
RUNS = "/srv/recommendations/runs"
GATE = "/srv/recommendations/gate.py"

RUN = f"{RUNS}/{{{{ ds }}}}"
STEPS = {
    "train": f"twotower train --config={CONFIG} --workdir={RUN}",
    "evaluate": f"twotower evaluate --workdir={RUN} --k=10 --baselines",
    "gate": f"python {GATE} {RUN} --least=1.2",
    "export": f"twotower export --workdir={RUN}",
    "history": f"twotower history --history={RUNS}/history --append={RUN} --run_date={{{{ ds }}}}",
}
# A model that is not good enough does not get better by a second look.
RETRIES = {"gate": 0}

with DAG(
    dag_id="recommendations",
    schedule="@daily",
    start_date=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    catchup=False,
    # Two trainings would compete for one accelerator.
    max_active_runs=1,
):
    previous = None
    for name, command in STEPS.items():
        task = BashOperator(
            task_id=name,
            bash_command=command,
            retries=RETRIES.get(name, 2),
            retry_delay=datetime.timedelta(minutes=5),
        )
        if previous is not None:
            previous >> task
        previous = task
