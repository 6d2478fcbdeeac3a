package integration

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// front is a world with one edge, a listener "web" and a Go backend as its
// default pool.
type front struct {
	*world
	edge    *harness.Edge
	address string
	backend *peers.Backend
}

func newFront(t *testing.T) *front {
	t.Helper()
	w := newWorld(t)
	f := &front{world: w}
	f.backend = w.Launch(t, peers.Go, peers.Options{})
	w.StartControlPlane()
	f.edge = w.StartEdge("one", "")
	f.address = w.Address()
	w.WaitAcked(w.Apply(harness.Certificate("site", w.Pair)+w.Pool("app", []*peers.Backend{f.backend}, "")+
		harness.Listener("web", f.address, "", "  pool: app\n")), f.edge)
	return f
}

// url is for clients that take no other address for a name than that in the URL,
// besides curl's --connect-to.
func (f *front) url(path string) string { return "https://" + harness.SiteName + path }

func TestClients(t *testing.T) {
	f := newFront(t)
	t.Run("curl", f.curl)
	t.Run("h2load", f.h2load)
	t.Run("s_client", f.sClient)
	t.Run("tls", f.tunnel)
}

func (f *front) curl(t *testing.T) {
	curl := harness.Need(t, "curl")
	ca := f.WriteFile("ca.pem", string(f.Authority.PEM()))
	upload := filepath.Join(t.TempDir(), "upload")
	if err := os.WriteFile(upload, peers.Body(peers.Large), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name, path string
		args       []string
		version    string
		want       []byte
	}{
		{"HTTP 1.0", peers.Small, []string{"--http1.0"}, "1", peers.Body(peers.Small)},
		{"HTTP 1.0 without ALPN", peers.Small, []string{"--http1.0", "--no-alpn"}, "1", peers.Body(peers.Small)},
		{"HTTP 1.0, no length", peers.Chunked, []string{"--http1.0"}, "1", peers.Body(peers.Chunked)},
		{"HTTP 1.0 keep-alive", peers.Small, []string{"--http1.0", "-H", "Connection: keep-alive"}, "1", peers.Body(peers.Small)},
		{"HTTP 1.1", peers.Large, []string{"--http1.1"}, "1.1", peers.Body(peers.Large)},
		{"HTTP 1.1 chunked", peers.Chunked, []string{"--http1.1"}, "1.1", peers.Body(peers.Chunked)},
		{"HTTP 1.1 upload", peers.Echo, []string{"--http1.1", "-H", "Expect:", "-T", upload, "-X", "POST"}, "1.1", peers.Body(peers.Large)},
		{"HTTP 1.1 upload without length", peers.Echo, []string{"--http1.1", "-H", "Expect:", "-H", "Transfer-Encoding: chunked", "-T", upload, "-X", "POST"}, "1.1", peers.Body(peers.Large)},
		{"HTTP 1.1 Expect", peers.Echo, []string{"--http1.1", "-H", "Expect: 100-continue", "--expect100-timeout", "30", "--data-binary", "@" + upload}, "1.1", peers.Body(peers.Large)},
		{"HTTP 2", peers.Large, []string{"--http2"}, "2", peers.Body(peers.Large)},
		{"HTTP 2 upload", peers.Echo, []string{"--http2", "--data-binary", "@" + upload}, "2", peers.Body(peers.Large)},
		{"HTTP 2 slow", peers.Slow, []string{"--http2"}, "2", peers.Body(peers.Slow)},
		{"TLS 1.2", peers.Small, []string{"--tls-max", "1.2"}, "2", peers.Body(peers.Small)},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			head := filepath.Join(t.TempDir(), "head")
			args := append([]string{
				"--silent", "--show-error", "--max-time", "50", "--cacert", ca, "--connect-to", "::" + f.address,
				"--dump-header", head, "--write-out", "%{stderr}%{http_version} %{http_code}", f.url(test.path),
			}, test.args...)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			command := exec.CommandContext(ctx, curl, args...)
			var stdout, stderr bytes.Buffer
			command.Stdout, command.Stderr = &stdout, &stderr
			if err := command.Run(); err != nil {
				t.Fatalf("curl: %v: %s", err, stderr.Bytes())
			}
			if !bytes.Equal(stdout.Bytes(), test.want) {
				t.Errorf("body of %d bytes, not the %d that were expected", stdout.Len(), len(test.want))
			}
			if got, want := stderr.String(), test.version+" 200"; !strings.HasPrefix(got, test.version) || !strings.HasSuffix(got, " 200") {
				t.Errorf("version and status %q, want %q", got, want)
			}
			header, err := os.ReadFile(head)
			if err != nil {
				t.Fatal(err)
			}
			if test.name == "HTTP 1.1 Expect" && !bytes.Contains(header, []byte("HTTP/1.1 100")) {
				t.Errorf("no 100 before the answer:\n%s", header)
			}
		})
	}
}

var h2loadDone = regexp.MustCompile(`requests: (\d+) total, \d+ started, (\d+) done, (\d+) succeeded, (\d+) failed, (\d+) errored`)

func (f *front) h2load(t *testing.T) {
	h2load := harness.Need(t, "h2load")
	_, port, err := net.SplitHostPort(f.address)
	if err != nil {
		t.Fatal(err)
	}
	before := f.ListenerStats("web")
	const requests, clients = 5000, 8
	output := harness.Run(t, nil, h2load, "-n", strconv.Itoa(requests), "-c", strconv.Itoa(clients), "-m", "10",
		"--connect-to="+f.address, "https://"+harness.SiteName+":"+port+peers.Small)
	match := h2loadDone.FindStringSubmatch(string(output))
	if match == nil || match[3] != strconv.Itoa(requests) || match[4] != "0" || match[5] != "0" {
		t.Errorf("h2load: not all %d requests succeeded:\n%s", requests, output)
	}
	if want := "Application protocol: h2"; !strings.Contains(string(output), want) {
		t.Errorf("h2load does not say %q:\n%s", want, output)
	}
	harness.Settle(t, func() error {
		after := f.ListenerStats("web")
		if got := after.Requests - before.Requests; got != requests {
			return fmt.Errorf("the listener counts %d requests, want %d", got, requests)
		}
		if got := after.Connections.Opened - before.Connections.Opened; got != clients {
			return fmt.Errorf("the listener counts %d connections, want %d", got, clients)
		}
		return nil
	})
}

// sClient compares the listener's handshakes with what openssl s_client says.
func (f *front) sClient(t *testing.T) {
	openssl := harness.Need(t, "openssl")
	session := filepath.Join(t.TempDir(), "session")
	request := "GET " + peers.Small + " HTTP/1.1\r\nHost: " + harness.SiteName + "\r\nConnection: close\r\n\r\n"
	tests := []struct {
		name string
		runs [][]string
		// of resumed handshakes
		ticket, psk bool
	}{
		{"TLS 1.2 reconnect", [][]string{{"-tls1_2", "-reconnect"}}, true, false},
		{"TLS 1.3 sessions", [][]string{{"-tls1_3", "-sess_out", session}, {"-tls1_3", "-sess_in", session, "-sess_out", session}, {"-tls1_3", "-sess_in", session}}, false, true},
		{"TLS 1.2 sessions", [][]string{{"-tls1_2", "-sess_out", session}, {"-tls1_2", "-sess_in", session, "-sess_out", session}, {"-tls1_2", "-sess_in", session}}, true, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			before := f.ListenerStats("web")
			var full, resumed int64
			for _, args := range test.runs {
				output := harness.Run(t, strings.NewReader(request), openssl,
					append([]string{"s_client", "-connect", f.address, "-servername", harness.SiteName, "-ign_eof"}, args...)...)
				if !bytes.Contains(output, peers.Body(peers.Small)) {
					t.Errorf("s_client got no body:\n%s", output)
				}
				full += int64(bytes.Count(output, []byte("\nNew, TLSv1")))
				resumed += int64(bytes.Count(output, []byte("\nReused, TLSv1")))
			}
			if full != 1 || resumed < 2 {
				t.Errorf("s_client saw %d full and %d resumed handshakes, want 1 and some", full, resumed)
			}
			harness.Settle(t, func() error {
				after := f.ListenerStats("web")
				gotFull := after.Handshakes.Full - before.Handshakes.Full
				gotTicket := after.Handshakes.Resumed.Ticket - before.Handshakes.Resumed.Ticket
				gotPSK := after.Handshakes.Resumed.PSK - before.Handshakes.Resumed.PSK
				wantTicket, wantPSK := int64(0), int64(0)
				if test.ticket {
					wantTicket = resumed
				}
				if test.psk {
					wantPSK = resumed
				}
				if gotFull != full || gotTicket != wantTicket || gotPSK != wantPSK {
					return fmt.Errorf("the listener counts %d full, %d by ticket, %d by PSK; s_client saw %d full, %d resumed", gotFull, gotTicket, gotPSK, full, resumed)
				}
				if after.Missed() != after.Handshakes.Full {
					return fmt.Errorf("misses %v don't add up to %d full handshakes", after.Misses, after.Handshakes.Full)
				}
				return nil
			})
		})
	}
}

// tunnel sends bytes through a listener with protocol tls. The backend answers
// only after the client's end of file, so half-close must pass.
func (f *front) tunnel(t *testing.T) {
	backend, stop := reverser(t, f.world)
	defer stop()
	address := f.Address()
	f.WaitAcked(f.Apply(f.Pool("bytes", []*peers.Backend{{Address: backend}}, "  protocol: tcp\n")+
		harness.Listener("bytes", address, "", "  protocol: tls\n  pool: bytes\n")), f.edge)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, size := range []int{0, 1, 1 << 20} {
			config := f.ClientTLS()
			config.MaxVersion = version
			conn, err := tls.Dial("tcp", address, config)
			if err != nil {
				t.Fatal(err)
			}
			_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
			sent := peers.Body(peers.Large)[:size]
			if _, err := conn.Write(sent); err != nil {
				t.Fatal(err)
			}
			if err := conn.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(conn)
			if err != nil {
				t.Errorf("%s, %d bytes: %v", tls.VersionName(version), size, err)
			}
			if !bytes.Equal(got, append([]byte("end of file after "), strconv.Itoa(size)...)) {
				t.Errorf("%s, %d bytes: answer %q", tls.VersionName(version), size, got)
			}
			_ = conn.Close()
		}
	}
}

// reverser is a TLS server that reads to the end of file and then says how much
// it read.
func reverser(t *testing.T, w *world) (address string, stop func()) {
	t.Helper()
	pair, err := w.Authority.Issue(peers.ServerName)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := pair.TLS()
	if err != nil {
		t.Fatal(err)
	}
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{certificate}})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
			if n, err := io.Copy(io.Discard, conn); err == nil {
				_, _ = fmt.Fprintf(conn, "end of file after %d", n)
			}
			_ = conn.Close()
		}
	}()
	return listener.Addr().String(), func() {
		_ = listener.Close()
		<-ended
	}
}
