"""`ebm-prior push` and `ebm-prior pull`: heads on the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ebm_prior.cli.options import HeadsChoice, device_option, json_option
from ebm_prior.errors import EbmPriorError

token_option = click.option(
    "--token", help="Hub token [default: that of hf auth login, or HF_TOKEN]."
)


@click.command()
@click.argument("source", metavar="HEADS")
@click.argument("repo_id", metavar="USER/NAME")
@click.option(
    "--ckpt", metavar="PATH", help="Backbone checkpoint [default: where the run found it]."
)
@click.option(
    "--no-pictures",
    is_flag=True,
    help="Leave the sample grids out of the card; needs no backbone then.",
)
@click.option("--license", "licence", metavar="ID", help="Licence of the heads, such as mit.")
@click.option(
    "--backbone-source", metavar="WHERE", help="Where the backbone is to be had: Hub id or URL."
)
@click.option("--backbone-license", metavar="ID", help="Licence of the backbone.")
@click.option(
    "--with-backbone",
    is_flag=True,
    help="Push the backbone too, as safetensors, where its licence allows.",
)
@click.option(
    "--card",
    type=click.Path(exists=True, dir_okay=False),
    help="Your own model card in place of the generated one.",
)
@click.option("--private/--public", default=None, help="Of a new repository [default: account's].")
@click.option("--branch", help="Branch to push to, made if there is none [default: main].")
@click.option("--create-pr", is_flag=True, help="Open a pull request in place of committing.")
@click.option("--message", default="Upload energy heads", show_default=True)
@token_option
@device_option
@json_option
def push(
    source: str,
    repo_id: str,
    ckpt: str | None,
    no_pictures: bool,
    licence: str | None,
    backbone_source: str | None,
    backbone_license: str | None,
    with_backbone: bool,
    card: str | None,
    private: bool | None,
    branch: str | None,
    create_pr: bool,
    message: str,
    token: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Publish the heads of a run or saved folder, with a model card, on the Hub.

    \b
    ebm-prior push runs/mine user/nvae-cifar10-ebm-prior --license mit
    ebm-prior push runs/mine user/name --private --create-pr

    Weights, configuration, card and sample grids appear in one commit. The card's numbers are
    those recorded by ebm-prior evaluate --record; it holds none that were not measured.
    """
    from ebm_prior import hub
    from ebm_prior.convert import converted_backbone
    from ebm_prior.pictures import card_pictures
    from ebm_prior.record import recorded_pictures

    repo_id = hub.check_can_push(repo_id, token)
    text = Path(card).read_text() if card else None
    if text is not None:
        hub.check_card(text)
    folder = Path(source)
    if not folder.is_dir():
        raise EbmPriorError(f"{source} is no folder of heads; fit some, or pull them first")
    heads = hub.open_source(folder)
    config = heads.config
    hub.read_weights(heads.weights(), config)
    hub.state_facts(config, licence, backbone_source, backbone_license)
    if with_backbone:
        backbone = converted_backbone(config, heads.checkpoint(ckpt))
    else:  # what heads were pulled with does not travel on by itself
        backbone = None
        config["backbone"].pop("converted", None)
    pictures = recorded_pictures(folder, config)
    if not no_pictures:
        try:
            prior, _, _ = HeadsChoice(source, None, ckpt, False, device).open()
        except EbmPriorError as error:
            raise EbmPriorError(f"{error} (or push without pictures: --no-pictures)") from error
        pictures |= card_pictures(prior)
    url = hub.push_files(
        heads.weights().read_bytes(),
        config,
        repo_id,
        pictures,
        card=text,
        backbone=backbone,
        private=private,
        token=token,
        branch=branch,
        create_pr=create_pr or None,
        commit_message=message,
    )
    if as_json:
        click.echo(json.dumps({"repo_id": repo_id, "url": url}))
        return
    if not config.get("license"):
        click.echo("the card says license: unknown; state one with --license", err=True)
    own = "" if with_backbone else " --ckpt PATH"
    click.echo(f"{url}\nnext: ebm-prior sample --heads {repo_id}{own}")


@click.command()
@click.argument("repo_id", metavar="USER/NAME[@REVISION]")
@click.option(
    "--out", metavar="DIR", help="New folder to write them to [default: the Hub's cache]."
)
@click.option("--with-backbone", is_flag=True, help="Fetch the backbone that is stored there too.")
@token_option
@json_option
def pull(
    repo_id: str, out: str | None, with_backbone: bool, token: str | None, as_json: bool
) -> None:
    """Fetch heads from the Hub and check them in full.

    \b
    ebm-prior pull user/nvae-cifar10-ebm-prior
    ebm-prior pull user/name@v1.0 --out heads

    Only JSON, safetensors and the text of the card are fetched, whatever else is there.
    """
    from ebm_prior import hub

    folder = hub.pull(repo_id, out, with_backbone=with_backbone, token=token)
    if as_json:
        click.echo(json.dumps({"repo_id": repo_id, "folder": str(folder)}))
        return
    where = out or repo_id
    ckpt = "" if with_backbone else " --ckpt PATH"
    click.echo(f"{folder}\nnext: ebm-prior sample --heads {where}{ckpt}")
