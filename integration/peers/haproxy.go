package peers

import (
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/reseal/reseal/integration/process"
)

// HAProxy starts HAProxy as a TLS terminator in front of a plain HTTP service
// in this process. Counts come from its statistics socket.
func HAProxy(ctx context.Context, o Options) (*Backend, error) {
	if o.NoSessions {
		return nil, fmt.Errorf("haproxy: without sessions: %w", ErrMode)
	}
	pair, err := o.issue()
	if err != nil {
		return nil, err
	}
	_, _, both, err := pair.Write(o.Dir, "haproxy")
	if err != nil {
		return nil, err
	}
	service, err := newService(Handler(false))
	if err != nil {
		return nil, err
	}
	address, err := o.listenAddress()
	if err != nil {
		return nil, errors.Join(err, service.stop())
	}
	// A socket path may have 107 bytes; those of test directories are longer.
	sockets, err := os.MkdirTemp("", "haproxy")
	if err != nil {
		return nil, errors.Join(err, service.stop())
	}
	socket := filepath.Join(sockets, "stats")
	stop := func() error { return errors.Join(service.stop(), os.RemoveAll(sockets)) }
	config, err := writeFile(o.Dir, "haproxy.cfg", []byte(haproxyConfig(o, socket, address, both, service.address())))
	if err != nil {
		return nil, errors.Join(err, stop())
	}
	haproxy, err := process.Start(process.Config{Path: "haproxy", Args: []string{"-db", "-f", config}})
	if err != nil {
		return nil, errors.Join(err, stop())
	}
	if err := started(haproxy, haproxy.WaitReady(ctx, func(ctx context.Context) error {
		_, err := haproxyStats(ctx, socket)
		return err
	})); err != nil {
		return nil, errors.Join(err, stop())
	}
	return &Backend{
		Name: "haproxy-" + o.Mode.String(), Address: address, Mode: o.Mode, paths: all(), output: haproxy.Output, running: haproxy,
		counts: func(ctx context.Context) (Counts, error) {
			stats, err := haproxyStats(ctx, socket)
			if err != nil {
				return Counts{}, fmt.Errorf("haproxy: counts: %w", err)
			}
			counts := Counts{
				Full: stats["ssl_sess"], Failed: stats["ssl_failed_handshake"],
				Connections: stats["conn_tot"], Requests: stats["req_tot"], Unclean: Unknown, Resets: Unknown,
			}
			counts.setResumed(o.Mode, stats["ssl_reused_sess"])
			return counts, nil
		},
		stop: func() error { return errors.Join(haproxy.Stop(), stop()) },
	}, nil
}

func haproxyConfig(o Options, socket, address, certificate, service string) string {
	bind := "ssl crt " + certificate + " ssl-min-ver " + protocolName(o.Mode) + " ssl-max-ver " + protocolName(o.Mode)
	if o.Mode == TLS12SessionIDs {
		bind += " no-tls-tickets"
	}
	if o.HTTP2 {
		bind += " alpn h2,http/1.1"
	}
	return fmt.Sprintf(`global
  stats socket %s mode 600 level user
  maxconn 4096
  nbthread 2
  tune.ssl.default-dh-param 2048
defaults
  mode http
  timeout connect 5s
  timeout client 120s
  timeout server 120s
  timeout http-keep-alive 120s
  %s
frontend tls
  bind %s %s backlog 1024
  default_backend service
backend service
  server service %s
`, socket, pick(o.CloseEach, "option httpclose", "option http-keep-alive"), address, bind, service)
}

// haproxyStats reads the frontend's counters.
func haproxyStats(ctx context.Context, socket string) (map[string]int64, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(conn, "show stat tls 1 -1\n"); err != nil {
		return nil, err
	}
	text, err := io.ReadAll(conn)
	if err != nil {
		return nil, err
	}
	rows, err := csv.NewReader(strings.NewReader(strings.TrimSpace(string(text)))).ReadAll()
	if err != nil {
		return nil, err
	}
	if len(rows) != 2 {
		return nil, fmt.Errorf("%d rows of statistics, want a header and the frontend:\n%s", len(rows), text)
	}
	stats := make(map[string]int64)
	for i, name := range rows[0] {
		if value, err := strconv.ParseInt(rows[1][i], 10, 64); err == nil {
			stats[name] = value
		}
	}
	if _, ok := stats["ssl_reused_sess"]; !ok {
		return nil, fmt.Errorf("no ssl_reused_sess in the statistics; HAProxy 2.2 or newer is needed")
	}
	return stats, nil
}

// service is a plain HTTP server in this process.
type service struct {
	listener net.Listener
	server   *http.Server
	ended    chan struct{}
}

func newService(handler http.Handler) (*service, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &service{
		listener: listener,
		server:   &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute},
		ended:    make(chan struct{}),
	}
	go func() {
		defer close(s.ended)
		_ = s.server.Serve(listener)
	}()
	return s, nil
}

func (s *service) address() string { return s.listener.Addr().String() }

func (s *service) stop() error {
	err := s.server.Close()
	<-s.ended
	return err
}
