// Command reseal-controlplane runs the control plane of a Reseal fleet.
package main

import (
	"context"
	"io"
	"os"

	"github.com/reseal/reseal/cmd/daemon"
	"github.com/reseal/reseal/controlplane"
)

var version = "devel" // set by the linker

const summary = `reseal-controlplane stores resources in etcd and pushes them to the edges of a fleet.

The first start makes a certificate authority and writes DATA-DIR/admin.yaml, a
context for resealctl with administrator rights.

Signals: SIGTERM and SIGINT end it, a second one at once. SIGHUP and SIGUSR1 do
nothing but a line in the log: it has nothing to read again, as all configuration
comes through its API. Flags are read at the start only.`

func main() { os.Exit(run(os.Args[1:], os.Stderr)) }

func run(args []string, stderr io.Writer) int {
	flags := daemon.NewFlags("reseal-controlplane", summary, stderr)
	var cfg controlplane.Config
	flags.StringVar(&cfg.DataDir, "data-dir", "reseal-data", "embedded store, key-encryption key and admin context, `DIR`")
	flags.StringVar(&cfg.Listen, "listen", ":7443", "gRPC services, mutual TLS, `ADDRESS`")
	flags.StringSliceVar(&cfg.Advertise, "advertise", nil, "`ADDRESSES` of --listen for the admin context (default 127.0.0.1 with its port)")
	page := daemon.Page{Flag: "http"}
	flags.StringVar(&page.Address, "http", "127.0.0.1:7480", "/healthz, /readyz and /metrics, `ADDRESS`; empty: off")
	pageTLS := flags.Bool("http-tls", false, "serve --http with mutual TLS: callers need a viewer's, operator's or administrator's certificate of this fleet")
	flags.BoolVar(&page.Insecure, "insecure-admin", false, "allow --http in plain text beyond loopback")
	flags.StringSliceVar(&cfg.EtcdEndpoints, "etcd-endpoints", nil, "external etcd cluster, `URLS`; empty: a store in this process")
	flags.StringVar(&cfg.EtcdCA, "etcd-ca", "", "PEM roots of the etcd cluster, `FILE`")
	flags.StringVar(&cfg.EtcdCert, "etcd-cert", "", "PEM client certificate for etcd, `FILE`")
	flags.StringVar(&cfg.EtcdKey, "etcd-key", "", "PEM key of --etcd-cert, `FILE`")
	flags.StringVar(&cfg.KEKFile, "kek-file", "", "key that encrypts all secrets in the store, `FILE` (default DATA-DIR/kek, generated)")
	flags.StringVar(&cfg.TrustDomain, "trust-domain", "reseal", "authority of the fleet's spiffe:// identities, `NAME`")
	flags.IntVar(&cfg.HistoryLimit, "history-limit", 100, "revisions that are kept")
	if done, code := flags.Parse(args, version); done {
		return code
	}
	logger, err := flags.Logger(stderr)
	if err != nil {
		_, code := flags.Usagef("%v", err)
		return code
	}
	cfg.Logger, cfg.Version = logger, version

	ctx, stop := daemon.SignalContext()
	defer stop()
	plane := controlplane.New(cfg)
	page.Handler, page.Logger = plane.Handler(), logger
	if *pageTLS {
		page.TLS = plane.PageTLS()
	}
	listener, err := page.Listen()
	if err != nil {
		_, code := flags.Usagef("%v", err)
		return code
	}
	reload := daemon.OnReload(logger, func() {}) // there is nothing to read again
	return daemon.Run(ctx, logger, reload, plane.Run, func(ctx context.Context) error { return page.Serve(ctx, listener) })
}
