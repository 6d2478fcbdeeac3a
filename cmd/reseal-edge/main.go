// Command reseal-edge runs one edge of a Reseal fleet.
package main

import (
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"

	// Images from scratch have no system roots; these are used where the
	// system has none.
	_ "golang.org/x/crypto/x509roots/fallback"

	"github.com/reseal/reseal/cmd/daemon"
	"github.com/reseal/reseal/edge"
)

var version = "devel" // set by the linker

const summary = `reseal-edge terminates client TLS and re-encrypts to TLS backends, as the control
plane says.

The first start needs a join token (resealctl token create --id ID). Later starts
use the certificate in the state directory.

Signals: SIGTERM and SIGINT drain (timeouts.drain of each listener) and end it; a
second one ends it at once. SIGHUP and SIGUSR1 open the access log anew, for
logrotate, and read the files that the configuration names (certificates, keys,
roots) without waiting for the next check. Flags are read only at the start. SIGUSR2
starts this program's file anew, with the same arguments: the new process takes over
listening sockets, state, keys and sessions, serves, and this one drains and ends. If
it can't, this one goes on and says why.`

// parseLabels reads "k=v,…". Empty means no labels.
func parseLabels(text string) (map[string]string, error) {
	labels := map[string]string{}
	for pair := range strings.SplitSeq(text, ",") {
		if pair == "" {
			continue
		}
		key, value, found := strings.Cut(pair, "=")
		if !found || key == "" {
			return nil, fmt.Errorf("%q is not of the form k=v", pair)
		}
		labels[key] = value
	}
	return labels, nil
}

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	flags := daemon.NewFlags("reseal-edge", summary, stderr)
	var cfg edge.Config
	flags.StringSliceVar(&cfg.ControlPlane, "control-plane", nil, "control-plane replicas, `HOST:PORT[,…]` (required)")
	flags.StringVar(&cfg.ID, "id", "", "this edge's id, as in its join token (required)")
	labels := flags.String("labels", "", "labels for selectors, `k=v,…`; those of the join token win")
	flags.StringVar(&cfg.StateDir, "state-dir", "reseal-edge-state", "identity and last good configuration, sealed, `DIR`")
	flags.StringVar(&cfg.StateKeyFile, "state-key-file", "", "key that seals the state, `FILE` (default STATE-DIR/key, generated)")
	page := daemon.Page{Flag: "admin"}
	flags.StringVar(&page.Address, "admin", "127.0.0.1:7481", "/healthz, /readyz, /metrics and /debug/pprof, `ADDRESS`; empty: off")
	pageTLS := flags.Bool("admin-tls", false, "serve --admin with mutual TLS: callers need an operator's certificate of this fleet")
	flags.BoolVar(&page.Insecure, "insecure-admin", false, "allow --admin in plain text beyond loopback, without /debug/pprof")
	flags.StringVar(&cfg.JoinTokenFile, "join-token-file", "", "join token for the first start, `FILE`")
	flags.StringVar(&cfg.CAHash, "ca-hash", "", "SHA-256 of the control plane's CA, for a join token without one, `HEX`")
	flags.StringVar(&cfg.TrustDomain, "trust-domain", "reseal", "authority of the fleet's spiffe:// identities, `NAME`")
	flags.DurationVar(&cfg.FeedWait, "feed-wait", edge.DefaultFeedWait, "how long a start waits for the feed before it serves the last good configuration")
	keepSessions := flags.Bool("keep-sessions", true, "keep backend sessions in the state directory, so that a restart costs no full handshake")
	flags.BoolVar(&cfg.KeepKeys, "keep-keys", true, "keep the fleet's ticket keys in the state directory, sealed, to resume sessions after a start without a control plane")
	memory := flags.String("memory-limit", "auto", "near it, new connections and requests are refused (503 memory_limit), `SIZE` as in 512MiB; 0: no limit; auto: GOMEMLIMIT, or 3/4 of what the control group or the machine has")
	accessLog := flags.String("access-log", "-", "JSON access log, `FILE`, opened anew on SIGHUP; -: standard output; empty: off")
	pid := flags.String("pid-file", "", "id of the process that serves, `FILE`; it is another one after an upgrade (SIGUSR2)")
	if done, code := flags.Parse(args, version); done {
		return code
	}
	if cfg.ID == "" || len(cfg.ControlPlane) == 0 {
		_, code := flags.Usagef("--id and --control-plane are required")
		return code
	}
	var err error
	if cfg.Labels, err = parseLabels(*labels); err != nil {
		_, code := flags.Usagef("--labels: %v", err)
		return code
	}
	logger, err := flags.Logger(stderr)
	if err != nil {
		_, code := flags.Usagef("%v", err)
		return code
	}
	cfg.Logger, cfg.Version = logger, version
	cfg.PaceGC = os.Getenv("GOGC") == ""
	cfg.ForgetSessions = !*keepSessions
	if cfg.MemoryLimit, err = memoryLimit(*memory); err != nil {
		_, code := flags.Usagef("--memory-limit: %v", err)
		return code
	}
	if cfg.MemoryLimit > 0 {
		debug.SetMemoryLimit(cfg.MemoryLimit) // collect garbage more often before memory is short
	}
	access, err := openAccessLog(*accessLog, stdout, logger)
	if err != nil {
		_, code := flags.Usagef("--access-log: %v", err)
		return code
	}
	defer access.Close()
	cfg.AccessLog, cfg.AccessLogDropped = access.records(), access.Dropped

	e := &process{cfg: cfg, page: page, pageTLS: *pageTLS, pidFile: pidFile(*pid), reopen: access.Reopen, flags: flags}
	return e.run(args, stdout, stderr)
}
