package integration

import (
	"context"
	"encoding/csv"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
)

// haproxy starts HAProxy with a backend section per play. One thread, since each
// has idle connections of its own; pool-low-conn, since HAProxy otherwise closes
// idle connections beyond the number that it takes to need.
func (r *rehearsal) haproxy(t *testing.T, plays []play) reuseProxy {
	t.Helper()
	harness.Need(t, "haproxy")
	dir := t.TempDir()
	_, _, site, err := r.Pair.Write(dir, "site")
	if err != nil {
		t.Fatal(err)
	}
	authority := filepath.Join(dir, "ca.crt")
	if err := os.WriteFile(authority, r.Authority.PEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	// A socket path may have 107 bytes; those of test directories are longer.
	sockets, err := os.MkdirTemp("", "reuse")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(sockets) })
	socket, address := filepath.Join(sockets, "stats"), r.Address()
	var config strings.Builder
	fmt.Fprintf(&config, `global
  stats socket %s mode 600 level user
  nbthread 1
  tune.ssl.default-dh-param 2048
defaults
  mode http
  timeout connect 10s
  timeout client 120s
  timeout server 120s
  timeout http-keep-alive 120s
frontend site
  bind %s ssl crt %s alpn h2,http/1.1
  use_backend %%[req.hdr(host),field(1,.)]
`, socket, address, site)
	for _, play := range plays {
		fmt.Fprintf(&config, `backend %s
  http-reuse %s
  server one %s ssl verify required ca-file %s sni str(%s) pool-low-conn 100 pool-purge-delay 120s%s
`, play.name, play.mode, r.backends[play.backendH2].Address, authority, peers.ServerName, pick(play.backendH2, " alpn h2", ""))
	}
	file := filepath.Join(dir, "haproxy.cfg")
	if err := os.WriteFile(file, []byte(config.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	haproxy, err := process.Start(process.Config{Path: "haproxy", Args: []string{"-db", "-f", file}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := haproxy.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("haproxy printed:\n%s", haproxy.Output())
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := haproxy.WaitReady(ctx, func(context.Context) error { return process.Listening(address) }); err != nil {
		t.Fatal(err)
	}
	return reuseProxy{address: address, busy: func(t *testing.T, play play) int {
		t.Helper()
		if play.mode == "never" {
			// A client's own connections count as used until the client is gone. It
			// has them back before it is asked for more.
			return -1
		}
		busy, err := haproxyBusy(socket, play.name)
		if err != nil {
			t.Fatal(err)
		}
		return busy
	}}
}

// haproxyBusy asks for the connections of a section's server that are in use.
func haproxyBusy(socket, section string) (int, error) {
	conn, err := net.DialTimeout("unix", socket, 5*time.Second)
	if err != nil {
		return 0, err
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := fmt.Fprintf(conn, "show stat %s 4 -1\n", section); err != nil {
		return 0, err
	}
	text, err := io.ReadAll(conn)
	if err != nil {
		return 0, err
	}
	rows, err := csv.NewReader(strings.NewReader(strings.TrimSpace(string(text)))).ReadAll()
	if err != nil {
		return 0, err
	}
	if len(rows) != 2 {
		return 0, fmt.Errorf("%d rows of statistics, want a header and the server:\n%s", len(rows), text)
	}
	for i, name := range rows[0] {
		if name == "used_conn_cur" {
			return strconv.Atoi(rows[1][i])
		}
	}
	return 0, fmt.Errorf("no used_conn_cur in the statistics; HAProxy 2.2 or newer is needed")
}
