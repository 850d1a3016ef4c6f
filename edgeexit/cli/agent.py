"""`edgeexit agent`: what a board answers over ssh, in JSON lines. People have other commands."""

import click

from edgeexit.cli import explained, one_line

# From the name of a subcommand to its answer.
SUBCOMMANDS = {
    "hello": "edgeexit.agent.hello:hello",
    "profile": "edgeexit.agent.profiling:profile",
    "deploy": "edgeexit.agent.delivery:deploy",
    "rollback": "edgeexit.agent.delivery:rollback",
    "status": "edgeexit.agent.delivery:status",
}


@click.command("agent", short_help="answer one order of another machine, in JSON lines")
@click.argument("subcommand", metavar="SUB")
def command(subcommand: str) -> None:
    """
    Answer one order that stands as a line of JSON on stdin; other machines call this over ssh.

    \b
    edgeexit agent hello      # then type: {}

    Prints only JSON lines: the version first, then {"progress": ...} and {"need": ...}, last
    {"result": ...} or {"error": ...}. It ends when stdin does. See docs/formats.md.
    """
    from edgeexit import agent, names

    def find() -> agent.Answer:
        found = names.load_attribute(
            names.choose(subcommand, SUBCOMMANDS, "subcommand"), "subcommand"
        )
        assert callable(found)
        return found

    def explain(error: BaseException) -> agent.Refusal:
        message, hint, code = explained(error)
        return one_line(message), hint and one_line(hint), code

    code = agent.serve(find, explain)
    if code:
        raise click.exceptions.Exit(code)
