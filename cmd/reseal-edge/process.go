package main

import (
	"context"
	"io"

	"github.com/reseal/reseal/cmd/daemon"
	"github.com/reseal/reseal/edge"
)

// process is an edge with its admin page, as the flags say.
type process struct {
	cfg     edge.Config
	page    daemon.Page
	pageTLS bool
	pidFile pidFile
	reopen  func() // opens the access log anew
	flags   *daemon.Flags
}

// run serves until a signal ends the process or another one has taken over, and returns
// the exit code. Args are what such a process is started with.
func (e *process) run(args []string, stdout, stderr io.Writer) int {
	ctx, stop := daemon.SignalContext()
	defer stop()
	next, err := newSuccession(args, stdout, stderr, e.cfg.Logger)
	if err != nil {
		e.cfg.Logger.Error("stopped", "error", err.Error())
		return daemon.ExitFailure
	}
	given, err := inherit(ctx)
	if err != nil {
		e.cfg.Logger.Error("stopped", "error", err.Error())
		return daemon.ExitFailure
	}
	e.cfg.Predecessor, e.cfg.Sockets = given.predecessor, given.sockets
	served := make(chan struct{})
	e.cfg.Served = func() {
		e.pidFile.write(e.cfg.Logger)
		next.notify(daemon.Ready, "STATUS=")
		close(served)
	}
	defer e.pidFile.remove()
	node := edge.New(e.cfg)
	e.page.Handler, e.page.Logger, e.page.Inherited = node.Handler(), e.cfg.Logger, given.page(e.page.Address)
	if e.pageTLS {
		e.page.TLS = node.PageTLS()
	}
	listener, err := e.page.Listen()
	if err != nil {
		_, code := e.flags.Usagef("%v", err)
		return code
	}
	reload := daemon.OnReload(e.cfg.Logger, func() {
		e.reopen()
		node.Reload()
	})
	ctx, end := context.WithCancel(ctx)
	defer end()
	pageCtx, leave := context.WithCancel(ctx)
	defer leave()
	next.node, next.page, next.leave = node, &e.page, leave
	serve := func(ctx context.Context) error {
		defer end() // also when another process has taken over
		defer context.AfterFunc(ctx, next.stopping)()
		return node.Run(ctx)
	}
	show := func(ctx context.Context) error {
		if given.predecessor != nil {
			select { // till then the page is the predecessor's
			case <-served:
			case <-ctx.Done():
			}
		}
		return e.page.Serve(pageCtx, listener)
	}
	return daemon.Run(ctx, e.cfg.Logger, reload, next.run, serve, show)
}
