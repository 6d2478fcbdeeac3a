// Command reseal-controlplane runs the control plane of a Reseal fleet.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/reseal/reseal/cmd/daemon"
	"github.com/reseal/reseal/controlplane"
)

var version = "devel" // set by the linker

const summary = `reseal-controlplane stores resources in etcd and pushes them to the edges of a fleet.

The first start makes a certificate authority and writes DATA-DIR/admin.yaml, a
context for resealctl with administrator rights.

"reseal-controlplane compact" makes room in a store that is full, and
"reseal-controlplane restore" reads a backup: see their --help.`

const compactSummary = `reseal-controlplane compact makes room in the store: it removes history beyond the
limits, drops superseded values, gives back their room and disarms etcd's alarm
("database space exceeded"). Stop the control plane first, unless the store is an
external cluster. It takes the control plane's flags and file; lower history limits
make more room. A running control plane does the same to its embedded store on its
own, but never to an external cluster, which others may use.`

const restoreSummary = `reseal-controlplane restore FILE reads a backup that "resealctl backup" made into an
empty store: the embedded one of a new --data-dir, or an external cluster. It needs
the --kek-file of the control plane that made it, and takes the control plane's flags
and file after FILE. Edges that find the restored control plane under their addresses
come back by themselves.`

// gcPercent is GOGC unless that is set: a control plane holds much, for each edge, and
// allocates little, so that less room for garbage costs it next to no time.
const gcPercent = 30

func main() {
	if len(os.Args) > 1 && os.Args[1] == "compact" {
		os.Exit(run(os.Args[2:], os.Stderr, compactSummary, compact))
	}
	if len(os.Args) > 1 && os.Args[1] == "restore" {
		file, args := "", os.Args[2:]
		if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
			file, args = args[0], args[1:]
		}
		os.Exit(run(args, os.Stderr, restoreSummary, func(flags *daemon.Flags, o *options, stderr io.Writer) int {
			return restore(flags, o, file, stderr)
		}))
	}
	os.Exit(run(os.Args[1:], os.Stderr, summary, serve))
}

// options are what the flags set.
type options struct {
	controlplane.Config
	page    daemon.Page
	pageTLS bool
}

func (o *options) define(flags *daemon.Flags) {
	flags.StringVar(&o.DataDir, "data-dir", "reseal-data", "embedded store, key-encryption key and admin context, `DIR`")
	flags.StringVar(&o.Listen, "listen", ":7443", "gRPC services, mutual TLS, `ADDRESS`")
	flags.StringSliceVar(&o.Advertise, "advertise", nil, "`ADDRESSES` of --listen for the admin context (default 127.0.0.1 with its port)")
	flags.StringVar(&o.ReplicaName, "replica-name", "", "this replica's name, another one for each: letters, digits, \".\", \"_\", \"-\", `NAME` (default the host and port of --listen)")
	flags.StringVar(&o.ReplicaAddress, "replica-address", "", "where other replicas reach --listen, `HOST:PORT` (default that address; when it is any, the one from which etcd is reached)")
	o.page.Flag = "http"
	flags.StringVar(&o.page.Address, "http", "127.0.0.1:7480", "/healthz, /readyz and /metrics, `ADDRESS`; empty: off")
	flags.BoolVar(&o.pageTLS, "http-tls", false, "serve --http with mutual TLS: callers need a viewer's, operator's or administrator's certificate of this fleet")
	flags.BoolVar(&o.page.Insecure, "insecure-admin", false, "allow --http in plain text beyond loopback")
	flags.StringSliceVar(&o.EtcdEndpoints, "etcd-endpoints", nil, "external etcd cluster, `URLS`; empty: a store in this process")
	flags.StringVar(&o.EtcdCA, "etcd-ca", "", "PEM roots of the etcd cluster, `FILE`")
	flags.StringVar(&o.EtcdCert, "etcd-cert", "", "PEM client certificate for etcd, `FILE`")
	flags.StringVar(&o.EtcdKey, "etcd-key", "", "PEM key of --etcd-cert, `FILE`")
	flags.Int64Var(&o.EtcdQuotaBytes, "etcd-quota-bytes", 2<<30, "largest size of the embedded store's database, `BYTES`; there is a warning at 80%, and from 90% on applies are refused")
	flags.StringVar(&o.KEKFile, "kek-file", "", "key that encrypts all secrets in the store, `FILE` (default DATA-DIR/kek, generated)")
	flags.StringVar(&o.TrustDomain, "trust-domain", "reseal", "authority of the fleet's spiffe:// identities, `NAME`")
	flags.DurationVar(&o.EdgeCertTTL, "edge-cert-ttl", 24*time.Hour, "how long an edge's certificate is valid, at least 10s; edges renew theirs halfway")
	flags.DurationVar(&o.ExpiredGrace, "expired-grace", 7*24*time.Hour, "how long after its certificate has expired an edge may still come back with it, by proof of its key; later it needs a new join token; 0: never")
	flags.StringVar(&o.AuditLog, "audit-log", "", "append each entry of the fleet's audit log, as a line of JSON, to `FILE`, mode 0600; it may be moved away at any time")
	flags.IntVar(&o.HistoryLimit, "history-limit", 100, "revisions that are kept")
	flags.IntVar(&o.HistoryBytes, "history-bytes", 64<<20, "`BYTES` that the kept revisions may take up; fewer are kept when changes are large")
}

func (o *options) check() error {
	switch {
	case o.EdgeCertTTL < 10*time.Second:
		return fmt.Errorf("--edge-cert-ttl: %s, it must be at least 10s", o.EdgeCertTTL)
	case o.ExpiredGrace < 0:
		return fmt.Errorf("--expired-grace: %s, it must be 0 (never) or more", o.ExpiredGrace)
	case o.HistoryLimit < 1:
		return fmt.Errorf("--history-limit: %d, it must be at least 1", o.HistoryLimit)
	case o.HistoryBytes < 1:
		return fmt.Errorf("--history-bytes: %d, it must be at least 1", o.HistoryBytes)
	case o.EtcdQuotaBytes < 16<<20:
		return fmt.Errorf("--etcd-quota-bytes: %d, it must be at least 16777216 (16 MiB)", o.EtcdQuotaBytes)
	}
	return nil
}

// run reads the flags and runs command with them.
func run(args []string, stderr io.Writer, summary string, command func(*daemon.Flags, *options, io.Writer) int) int {
	flags, o := daemon.NewFlags("reseal-controlplane", summary, stderr), &options{}
	o.define(flags)
	if done, code := flags.Parse(args, version); done {
		return code
	}
	logger, err := flags.Logger(stderr)
	if err == nil {
		err = o.check()
	}
	if err != nil {
		_, code := flags.Usagef("%v", err)
		return code
	}
	o.Logger, o.Version = logger, version
	return command(flags, o, stderr)
}

func compact(_ *daemon.Flags, o *options, stderr io.Writer) int {
	ctx, stop := daemon.SignalContext()
	defer stop()
	return daemon.Run(ctx, o.Logger, func(ctx context.Context) error { return controlplane.Compact(ctx, o.Config, stderr) })
}

func restore(flags *daemon.Flags, o *options, file string, stderr io.Writer) int {
	if file == "" {
		_, code := flags.Usagef("name the backup: reseal-controlplane restore FILE [FLAGS]")
		return code
	}
	ctx, stop := daemon.SignalContext()
	defer stop()
	return daemon.Run(ctx, o.Logger, func(ctx context.Context) error { return controlplane.Restore(ctx, o.Config, file, stderr) })
}

func serve(flags *daemon.Flags, o *options, _ io.Writer) int {
	ctx, stop := daemon.SignalContext()
	defer stop()
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	plane := controlplane.New(o.Config)
	o.page.Handler, o.page.Logger = plane.Handler(), o.Logger
	if o.pageTLS {
		o.page.TLS = plane.PageTLS()
	}
	listener, err := o.page.Listen()
	if err != nil {
		_, code := flags.Usagef("%v", err)
		return code
	}
	reload := daemon.OnReload(o.Logger, func() {}) // there is nothing to read again
	return daemon.Run(ctx, o.Logger, reload, plane.Run, func(ctx context.Context) error { return o.page.Serve(ctx, listener) })
}
