package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	"golang.org/x/net/netutil"
)

const (
	// maxConnections bounds those of a page, so that whoever opens more does not use
	// up the descriptors of the process. Silent ones end after headerTimeout.
	maxConnections = 64
	headerTimeout  = 5 * time.Second
	// writeTimeout bounds an answer that nobody reads. Profiles take as long as they
	// are asked to.
	writeTimeout = 5 * time.Minute
)

// Page is a daemon's HTTP page: health, metrics and, on loopback, profiles.
type Page struct {
	// Flag is the flag that named the address, for errors.
	Flag string
	// Address is host:port. Empty: no page.
	Address string
	// TLS, if set, serves with mutual TLS, on any address.
	TLS *tls.Config
	// Insecure allows a plain page on an address that is not loopback. It then
	// serves /healthz, /readyz and /metrics alone.
	Insecure bool
	// Handler is the whole page.
	Handler http.Handler
	// Logger is for errors of the server.
	Logger *slog.Logger
	// Inherited, unless nil, is a listening socket for Address that another process had.
	// Listen takes it.
	Inherited *os.File

	socket *net.TCPListener
}

// Listen binds the address, for at most 64 connections at a time. A plain page beyond loopback is refused unless
// Insecure says otherwise.
func (p *Page) Listen() (net.Listener, error) {
	if p.Address == "" {
		return nil, nil
	}
	host, _, err := net.SplitHostPort(p.Address)
	if err != nil {
		return nil, fmt.Errorf("--%s: %w", p.Flag, err)
	}
	if p.TLS == nil && !isLoopback(host) {
		if !p.Insecure {
			return nil, fmt.Errorf("--%s: %s is not a loopback address: serve it with mutual TLS (--%s-tls), or serve only /healthz, /readyz and /metrics in plain text (--insecure-admin)", p.Flag, p.Address, p.Flag)
		}
		p.Handler = publicOnly(p.Handler)
	}
	listener, err := p.bind()
	if err != nil {
		return nil, fmt.Errorf("--%s: %w", p.Flag, err)
	}
	p.socket, _ = listener.(*net.TCPListener)
	return netutil.LimitListener(listener, maxConnections), nil
}

func (p *Page) bind() (net.Listener, error) {
	if p.Inherited == nil {
		return net.Listen("tcp", p.Address)
	}
	listener, err := net.FileListener(p.Inherited)
	return listener, errors.Join(err, p.Inherited.Close())
}

// File is the listening socket for another process, which inherits it; nil without one.
// The caller closes it.
func (p *Page) File() (*os.File, error) {
	if p.socket == nil {
		return nil, nil
	}
	return p.socket.File()
}

// Serve answers on listener until ctx ends. A nil listener serves nothing.
func (p *Page) Serve(ctx context.Context, listener net.Listener) error {
	if listener == nil {
		<-ctx.Done()
		return nil
	}
	server := &http.Server{
		Handler:           p.Handler,
		ReadHeaderTimeout: headerTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(p.Logger.Handler(), slog.LevelDebug),
	}
	server.TLSConfig = p.TLS
	stop := context.AfterFunc(ctx, func() {
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if server.Shutdown(bounded) != nil {
			server.Close()
		}
	})
	defer stop()
	var err error
	if p.TLS != nil {
		err = server.ServeTLS(listener, "", "")
	} else {
		err = server.Serve(listener)
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("--%s: %w", p.Flag, err)
}

func isLoopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

func publicOnly(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/healthz", "/readyz", "/metrics":
			next.ServeHTTP(w, r)
		default:
			http.NotFound(w, r)
		}
	})
}
