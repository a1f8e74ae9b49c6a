"""Publishing to a real HTTP server that is strict about hashes, objects and tokens; and loading what was published."""

import json

import yaml
from hub_server import READER, WRITER

NET = "eca_mobilenetv2_050"
FILES = [".gitattributes", "README.md", "config.json", "model.safetensors"]


def uploads(server):
    return sum(method == "PUT" for method, *_ in server.log)


def test_push_then_load(server, client):
    pushed = client().run(
        """
push = lambda seed, **kwargs: hub.push(net(seed), "lab/net", **kwargs)
attempt("anonymous", lambda: push(1, token=False), str)
attempt("reader", lambda: push(1, token="hf_reader"), str)
attempt("first", lambda: push(1, private=True), str)
attempt("second", lambda: push(2), str)
attempt("nothing new", lambda: push(2), str)
attempt("pull request", lambda: push(3, create_pr=True), str)
attempt("branch", lambda: push(3, revision="dev"), str)
attempt("update of the pull request", lambda: push(1, revision="refs/pr/1"), str)
attempt("no pull request", lambda: push(1, revision="refs/pr/9"), str)
attempt("revision in the name", lambda: hub.push(net(1), "lab/net@dev"))
attempt("bad name", lambda: hub.push(net(3), "lab"))
results["digests"] = [digest(net(seed)) for seed in (1, 2, 3)]
""",
        HF_TOKEN=WRITER,
    )
    repo = server.repos["lab/net"]
    assert pushed["anonymous"][0] == "WeightsError"
    assert "401" in pushed["anonymous"][1]
    assert "write token" in pushed["reader"][1]
    assert repo.private
    done = ("first", "second", "nothing new", "pull request", "branch", "update of the pull request")
    assert [pushed[k][0] for k in done] == ["ok"] * len(done)
    assert pushed["nothing new"] == pushed["second"]
    assert "/discussions/1" in pushed["pull request"][1]
    assert pushed["no pull request"][0] == "WeightsError"
    assert pushed["bad name"][0] == pushed["revision in the name"][0] == "ValueError"
    assert len(repo.commits) == 6  # the empty one, two pushes, the pull request, the branch, the update
    assert uploads(server) == 3  # nothing is sent twice
    first, second = list(repo.commits)[1:3]
    assert repo.refs["main"] == second
    assert sorted(server.files("lab/net")) == FILES
    assert not [path for commit in repo.commits.values() for path in commit if path.endswith((".bin", ".pth"))]

    loaded = client().run(
        f"""
attempt("main", lambda: hub.load("lab/net"))
attempt("first", lambda: hub.load("lab/net@{first}"))
attempt("branch", lambda: hub.load("lab/net@dev"))
attempt("pull request", lambda: hub.load("lab/net@refs/pr/1"))
attempt("through timm", lambda: timm.create_model("hf-hub:lab/net", pretrained=True))
attempt("features", lambda: hub.load("lab/net", features_only=True), lambda model: len(model.feature_info))
attempt("verify", lambda: hub.verify("lab/net"), lambda found: found["architecture"])
model = hub.load("lab/net", num_classes=7)
results["classes"] = [model.num_classes, model.pretrained_cfg["hf_hub_id"]]
""",
        HF_TOKEN=READER,
    )
    one, two, three = pushed["digests"]
    assert loaded["main"] == loaded["through timm"] == ["ok", two]
    assert loaded["first"] == loaded["pull request"] == ["ok", one]
    assert loaded["branch"] == ["ok", three]
    assert loaded["features"] == ["ok", 5]
    assert loaded["verify"] == ["ok", NET]
    assert loaded["classes"] == [7, "lab/net"]


def test_what_is_there_stays(server, client, folder):
    """A card written by hand is not replaced, and nothing goes to a public repository that was to be private."""
    server.put("lab/net", folder)
    files = server.repos["lab/net"].commits[server.repos["lab/net"].refs["main"]]
    files["README.md"] = server.store("README.md", b"---\nlicense: mit\n---\nby hand\n")
    found = client().run(
        """
attempt("push", lambda: hub.push(net(1), "lab/net"), str)
attempt("private", lambda: hub.push(net(2), "lab/net", private=True), str)
""",
        HF_TOKEN=WRITER,
    )
    assert found["push"][0] == "ok"
    assert found["private"] == ["WeightsError", "lab/net is there already and public: nothing was uploaded."]
    assert server.files("lab/net")["README.md"].endswith(b"by hand\n")
    assert (len(server.repos["lab/net"].commits), uploads(server)) == (2, 1)


def test_licenses(server, client):
    """The Hub refuses a card with a license that its list lacks, which timm names for some models."""
    found = client().run(
        """
for number, license in enumerate(["cc-by-nc-4.0", "mobileone-license", None]):
    model = net(1)
    model.pretrained_cfg["license"] = license
    attempt(str(license), lambda: hub.push(model, f"lab/{number}"), str)
attempt("by hand", lambda: hub.push(net(1), "lab/hand", card="---\\nlicense: mobileone-license\\n---\\n"), str)
""",
        HF_TOKEN=WRITER,
    )
    assert [found[name][0] for name in ("cc-by-nc-4.0", "mobileone-license", "None")] == ["ok"] * 3, found
    assert found["by hand"][0] == "WeightsError"
    cards = [yaml.safe_load(server.files(f"lab/{n}")["README.md"].split(b"---")[1]) for n in range(3)]
    assert [card["license"] for card in cards] == ["cc-by-nc-4.0", "other", "unknown"]
    assert [card.get("license_name") for card in cards] == [None, "mobileone-license", None]


def test_faults(server, client, folder):
    server.put("lab/put-always", folder)
    before = server.repos["lab/put-always"].refs["main"]
    for name, kind, times in (("always", 500, -1), ("once", 500, 1), ("reset", "reset", 1), ("flip", "flip", 1)):
        server.fault("PUT", f"/lfs/lab/put-{name}/", kind, times)
    server.fault("POST", "lab/commit-always/commit", 503, times=-1)
    server.fault("POST", "lab/commit-once/commit", 503)
    server.fault("POST", "lab/commit-reset/commit", "reset")
    server.fault("POST", "lab/batch-once.git/info/lfs", 500)
    found = client().run(
        """
model = net(1)
names = ["put-always", "put-once", "put-reset", "commit-always", "commit-once", "commit-reset", "batch-once"]
for name in names:
    model.conv_stem.weight.data.add_(1)  # other bytes each time, so that each is sent
    attempt(name, lambda: hub.push(model, f"lab/{name}"), str)
""",
        HF_TOKEN=WRITER,
    )
    for name in ("put-once", "put-reset", "commit-once", "commit-reset", "batch-once"):
        assert found[name][0] == "ok", found[name]
        assert sorted(server.files(f"lab/{name}")) == FILES
        assert len(server.repos[f"lab/{name}"].commits) == 2
    for name in ("put-always", "commit-always"):
        kind, message = found[name]
        assert (kind, message.count("\n")) == ("WeightsError", 0)
        assert message.startswith(f"the upload of lab/{name} on {server.url}: ")
    assert server.repos["lab/put-always"].refs["main"] == before
    assert list(server.files("lab/commit-always")) == [".gitattributes"]


def test_a_pull_request_is_opened_once(server, client):
    """Another try could open a second one: the answer was lost, not the request."""
    server.fault("POST", "lab/net/commit", "reset")
    found = client().run(
        """
attempt("reset", lambda: hub.push(net(1), "lab/net", create_pr=True), str)
""",
        HF_TOKEN=WRITER,
    )
    assert found["reset"][0] == "WeightsError"
    assert server.repos["lab/net"].pulls <= 1
    assert len([path for method, path, _ in server.log if method == "POST" and "/commit/" in path]) == 1


def test_refused(server, client, folder):
    """The Hub's reason is shown, not only the client's heading."""
    statuses = (400, 401, 403, 404, 409, 412, 413, 416, 422, 429)
    for status in statuses:
        server.fault("POST", f"lab/net{status}/commit", status, times=-1)
    found = client().run(
        f"""
for status in {statuses}:
    attempt(str(status), lambda: hub.push({str(folder)!r}, f"lab/net{{status}}"), str)
attempt("card", lambda: hub.push(net(1), "lab/card", card="---\\ntags: [x]\\n---\\n"), str)
""",
        HF_TOKEN=WRITER,
    )
    for status in statuses:
        kind, message = found[str(status)]
        assert kind in ("WeightsError", "MissingWeightsError")
        assert "planted" in message
        assert "\n" not in message
    assert found["400"][1].endswith(": BadRequestError: Bad request for commit endpoint: planted")
    assert found["card"] == [
        "WeightsError",
        f"the upload of lab/card on {server.url}: ValueError: Invalid metadata in README.md."
        ' - "license" must be one of those that the Hub knows',
    ]


def test_killed_on_the_way(server, client, folder):
    server.put("lab/net", folder)
    before = server.repos["lab/net"].refs["main"]
    server.fault("PUT", "/lfs/lab/net/", "stall")
    push = 'attempt("push", lambda: hub.push(net(1), "lab/net"), str)'
    writer = client().start(push, HF_TOKEN=WRITER)
    writer.kill_when(lambda: uploads(server))
    assert server.repos["lab/net"].refs["main"] == before
    assert writer.again().run(push, HF_TOKEN=WRITER)["push"][0] == "ok"
    check_whole(server, "lab/net")


def test_two_at_once(server, client):
    push = 'attempt("push", lambda: hub.push(net({}), "lab/net"), str)'
    both = [client().start(push.format(seed), HF_TOKEN=WRITER) for seed in (1, 2)]
    assert [process.results()["push"][0] for process in both] == ["ok", "ok"]
    assert len(server.repos["lab/net"].commits) == 3
    check_whole(server, "lab/net")


def check_whole(server, repo):
    """Each commit's weights are those whose digest its config records."""
    for oid in list(server.repos[repo].commits)[1:]:
        files = server.files(repo, oid)
        recorded = json.loads(files["config.json"])["weights"]["sha256"]
        assert recorded == server.repos[repo].commits[oid]["model.safetensors"]


def test_on_the_console(server, client, folder):
    writer = client()
    writer.env["HF_TOKEN"] = WRITER
    code, output, progress = writer.command(
        "push", folder, "lab/net", "--private", "--revision", "dev", TQDM_POSITION="-1"
    )
    assert (code, output) == (0, f"{server.url}/lab/net/commit/{server.repos['lab/net'].refs['dev']}\n")
    assert "100%" in progress
    assert server.repos["lab/net"].private
    assert sorted(server.files("lab/net", "dev")) == FILES
    code, output, _ = writer.command("push", folder, "lab/net", "--create-pr")
    assert (code, output) == (0, f"{server.url}/lab/net/discussions/1\n")
    for arguments, message in (
        ((folder.parent, "lab/net"), "is no folder in Hub format: it has no config.json"),
        ((folder, "net"), "A repository is named 'org/name'"),
    ):
        code, output, error = writer.command("push", *arguments)
        assert (code, output, error.count("\n")) == (2, "", 1)
        assert message in error
    code, _, error = writer.command("push", folder, "lab/net", HF_TOKEN="hf_wrong")
    assert (code, error.count("\n")) == (2, 1)


def test_owners_default_and_a_card_by_hand(server, client):
    """A new repository is as private as its owner's default says; a card that is given is not left out."""
    found = client().run(
        """
attempt("new", lambda: hub.push(net(1), "lab/net"), str)
attempt("card", lambda: hub.push(net(1), "lab/net", card="---\\nlicense: mit\\n---\\nby hand\\n"), str)
""",
        HF_TOKEN=WRITER,
    )
    assert [kind for kind, _ in found.values()] == ["ok", "ok"]
    assert "by hand" in server.files("lab/net")["README.md"].decode()
    assert not {"private", "visibility"} & server.asked[0].keys()
