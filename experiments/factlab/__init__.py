"""What the experiments on facts share: facts as token arrays, quick trainings with memjax's step, many runs at once."""
