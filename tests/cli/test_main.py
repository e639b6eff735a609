"""The command line as a whole: help without heavy imports, errors of the file system as sentences."""

import subprocess
import sys

from click.testing import CliRunner

from dalle_fast.cli.__main__ import COMMANDS, main


def test_help_lists_every_command_and_imports_no_torch():
    code = "import sys; sys.argv = ['dalle-fast', '--help']\nfrom dalle_fast.cli.__main__ import main\n"
    code += "try: main()\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert all(command in done.stdout for command in COMMANDS)


def test_a_path_that_cannot_be_used_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    result = CliRunner().invoke(main, ["draw", "a cat", "--out", str(blocked / "sheet.png")])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {blocked}") and "Name a path you can use." in result.output
