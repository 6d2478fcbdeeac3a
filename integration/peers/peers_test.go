package peers_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type start struct {
	name  string
	start func(context.Context, peers.Options) (*peers.Backend, error)
}

var starts = []start{
	{"jetty", peers.Jetty}, {"jetty-arranged", peers.JettyArranged}, {"nginx", peers.Nginx}, {"haproxy", peers.HAProxy}, {"openssl", peers.OpenSSL}, {"go", peers.Go},
}

// unsupported are the combinations of TestUnsupportedModes.
func unsupported(s start, o peers.Options) bool {
	return s.name == "openssl" && o.HTTP2 || s.name == "go" && o.Mode == peers.TLS12SessionIDs
}

// launch starts a backend for the length of a test.
func launch(t *testing.T, s start, o peers.Options) (*peers.Backend, *peers.Authority) {
	t.Helper()
	authority, err := peers.NewAuthority("peers test")
	if err != nil {
		t.Fatal(err)
	}
	o.Authority, o.Dir = authority, t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	backend, err := s.start(ctx, o)
	if errors.Is(err, process.ErrMissing) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := backend.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("%s printed:\n%s", backend.Name, backend.Output())
		}
		if process.Listening(backend.Address) == nil {
			t.Errorf("someone still listens on %s", backend.Address)
		}
	})
	return backend, authority
}

func client(t *testing.T, authority *peers.Authority, http2 bool) *http.Client {
	t.Helper()
	protocols := new(http.Protocols)
	protocols.SetHTTP1(!http2)
	protocols.SetHTTP2(http2)
	transport := &http.Transport{
		Protocols: protocols,
		TLSClientConfig: &tls.Config{
			RootCAs: authority.Pool(), ServerName: peers.ServerName, ClientSessionCache: tls.NewLRUClientSessionCache(16),
		},
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 30 * time.Second}
}

// eventually waits until the backend's counts satisfy a condition.
func eventually(t *testing.T, backend *peers.Backend, what string, condition func(peers.Counts) bool) peers.Counts {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for {
		counts, err := backend.Counts(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if condition(counts) {
			return counts
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: want %s; counts are %+v", backend.Name, what, counts)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func TestContent(t *testing.T) {
	for _, s := range starts {
		for _, variant := range []peers.Options{{}, {CloseEach: true}, {HTTP2: true}, {Mode: peers.TLS12SessionIDs}} {
			if unsupported(s, variant) {
				continue
			}
			name := fmt.Sprintf("%s/%v/close=%t/h2=%t", s.name, variant.Mode, variant.CloseEach, variant.HTTP2)
			t.Run(name, func(t *testing.T) {
				backend, authority := launch(t, s, variant)
				if err := peers.Verify(t.Context(), client(t, authority, variant.HTTP2), "https://"+backend.Address, backend); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestCountsAgainstOpenSSL compares what backends count with what OpenSSL's
// client says of the same handshakes.
func TestCountsAgainstOpenSSL(t *testing.T) {
	openssl, err := process.Find("openssl", "")
	if err != nil {
		t.Skip(err)
	}
	for _, s := range starts {
		for _, mode := range []peers.Mode{peers.TLS12SessionIDs, peers.TLS12Tickets, peers.TLS13} {
			if unsupported(s, peers.Options{Mode: mode}) || s.name == "jetty" && mode == peers.TLS12Tickets {
				continue // of Jetty see TestStockJetty
			}
			t.Run(s.name+"/"+mode.String(), func(t *testing.T) {
				backend, _ := launch(t, s, peers.Options{Mode: mode, CloseEach: true})
				session := filepath.Join(t.TempDir(), "session")
				var full, resumed int64
				handshake := func(arguments ...string) {
					news, reuses := sClient(t, openssl, backend.Address, arguments...)
					full, resumed = full+news, resumed+reuses
				}
				handshake("-sess_out", session)
				for range 3 {
					handshake("-sess_in", session, "-sess_out", session)
				}
				handshake()
				if mode != peers.TLS13 {
					// s_client connects again before tickets of TLS 1.3 arrive.
					handshake("-reconnect")
				}
				if full < 2 || resumed < 3 {
					t.Fatalf("s_client saw %d full and %d resumed handshakes; it should have resumed", full, resumed)
				}
				counts := eventually(t, backend, fmt.Sprintf("%d full, %d resumed", full, resumed), func(c peers.Counts) bool {
					return c.Full == full && c.Resumed() == resumed
				})
				byMechanism := map[peers.Mode]int64{
					peers.TLS13: counts.ResumedPSK, peers.TLS12Tickets: counts.ResumedTicket, peers.TLS12SessionIDs: counts.ResumedSessionID,
				}
				if byMechanism[mode] != resumed {
					t.Errorf("by mechanism: %+v, want all %d under %v", counts, resumed, mode)
				}
				if counts.Failed != 0 {
					t.Errorf("%d failed handshakes, want 0", counts.Failed)
				}
			})
		}
	}
}

// sClient runs openssl s_client with one request and returns how many of its
// handshakes were new and reused.
func sClient(t *testing.T, openssl, address string, arguments ...string) (news, reuses int64) {
	t.Helper()
	if !slices.Contains(arguments, "-noservername") {
		arguments = append([]string{"-servername", peers.ServerName}, arguments...)
	}
	arguments = append([]string{"s_client", "-connect", address, "-ign_eof"}, arguments...)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	command := exec.CommandContext(ctx, openssl, arguments...)
	command.Stdin = strings.NewReader("GET " + peers.Small + " HTTP/1.1\r\nHost: " + peers.ServerName + "\r\nConnection: close\r\n\r\n")
	output, err := command.CombinedOutput()
	if err != nil {
		t.Fatalf("s_client: %v\n%s", err, output)
	}
	if !bytes.Contains(output, peers.Body(peers.Small)) {
		t.Fatalf("no body in the output of s_client:\n%s", output)
	}
	for line := range strings.Lines(string(output)) {
		switch {
		case strings.HasPrefix(line, "New, TLSv1"):
			news++
		case strings.HasPrefix(line, "Reused, TLSv1"):
			reuses++
		}
	}
	return news, reuses
}

// TestUncleanEnds closes connections in ways that backends should tell apart.
func TestUncleanEnds(t *testing.T) {
	ends := []struct {
		name          string
		end           func(*tls.Conn)
		unclean, rsts int64
	}{
		{"close_notify", func(c *tls.Conn) {
			_ = c.CloseWrite()
			drain(c.NetConn())
		}, 0, 0},
		{"FIN", func(c *tls.Conn) {
			_ = c.NetConn().(*net.TCPConn).CloseWrite()
			drain(c.NetConn())
		}, 1, 0},
		{"RST", func(c *tls.Conn) {
			_ = c.NetConn().(*net.TCPConn).SetLinger(0)
			_ = c.NetConn().Close()
		}, 1, 1},
	}
	for _, s := range []start{{"jetty", peers.Jetty}, {"go", peers.Go}} {
		for _, mode := range []peers.Mode{peers.TLS12Tickets, peers.TLS13} {
			t.Run(s.name+"/"+mode.String(), func(t *testing.T) {
				backend, authority := launch(t, s, peers.Options{Mode: mode})
				var unclean, rsts int64
				for _, end := range ends {
					conn, err := tls.Dial("tcp", backend.Address, &tls.Config{RootCAs: authority.Pool(), ServerName: peers.ServerName})
					if err != nil {
						t.Fatal(err)
					}
					request(t, conn)
					end.end(conn)
					unclean, rsts = unclean+end.unclean, rsts+end.rsts
					eventually(t, backend, fmt.Sprintf("after %s: %d unclean, %d resets", end.name, unclean, rsts), func(c peers.Counts) bool {
						return c.Unclean == unclean && c.Resets == rsts
					})
				}
				// What came late would show by now.
				counts := eventually(t, backend, "3 connections and requests", func(c peers.Counts) bool { return c.Connections == 3 && c.Requests == 3 })
				if counts.Unclean != 2 || counts.Resets != 1 || counts.Full != 3 {
					t.Errorf("counts %+v, want 2 unclean, 1 reset, 3 full", counts)
				}
			})
		}
	}
}

// drain closes socket once its peer has: a ticket that comes late and is not read
// would turn the end into an RST.
func drain(socket net.Conn) {
	_ = socket.SetReadDeadline(time.Now().Add(10 * time.Second))
	_, _ = io.Copy(io.Discard, socket)
	_ = socket.Close()
}

// request makes one small keep-alive request on conn.
func request(t *testing.T, conn *tls.Conn) {
	t.Helper()
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", peers.Small, peers.ServerName); err != nil {
		t.Fatal(err)
	}
	var got []byte
	buffer := make([]byte, 4096)
	for !bytes.HasSuffix(got, peers.Body(peers.Small)) {
		n, err := conn.Read(buffer)
		if err != nil {
			t.Fatalf("after %q: %v", got, err)
		}
		got = append(got, buffer[:n]...)
	}
}

// TestStrictJetty proves that the strict mode drops a session after an unclean
// end and keeps it after a clean one.
func TestStrictJetty(t *testing.T) {
	for _, strict := range []bool{false, true} {
		t.Run(fmt.Sprintf("strict=%t", strict), func(t *testing.T) {
			openssl, err := process.Find("openssl", "")
			if err != nil {
				t.Skip(err)
			}
			backend, _ := launch(t, start{"jetty", peers.Jetty}, peers.Options{Mode: peers.TLS12SessionIDs, Strict: strict})
			session := filepath.Join(t.TempDir(), "session")
			run := func(arguments ...string) (int64, int64) {
				return sClient(t, openssl, backend.Address, append(arguments, "-tls1_2")...)
			}
			run("-sess_out", session)
			if news, reuses := run("-sess_in", session); news != 0 || reuses != 1 {
				t.Fatalf("after a clean end: %d new, %d reused, want 0 and 1", news, reuses)
			}
			killed := unclean(t, openssl, backend.Address, session)
			eventually(t, backend, "1 unclean", func(c peers.Counts) bool { return c.Unclean == 1 })
			if !killed {
				t.Fatal("the third connection was not resumed")
			}
			news, _ := run("-sess_in", session)
			if want := map[bool]int64{true: 1, false: 0}[strict]; news != want {
				t.Errorf("after an unclean end: %d new handshakes, want %d", news, want)
			}
		})
	}
}

// TestStockJetty pins down what JSSE does with sessions when Jetty chooses
// certificates by SNI, and that it does otherwise when it need not choose. If a
// newer Java changes this, what the README says of it changes too.
func TestStockJetty(t *testing.T) {
	openssl, err := process.Find("openssl", "")
	if err != nil {
		t.Skip(err)
	}
	type counts = peers.Counts
	for _, home := range peers.Javas() {
		for _, test := range []struct {
			name      string
			start     start
			mode      peers.Mode
			arguments []string
			want      counts // after one handshake with a new session and two that offer it
		}{
			{"two names, ticket extension", start{"jetty", peers.Jetty}, peers.TLS12Tickets, nil, counts{Full: 3}},
			{"two names, no ticket extension", start{"jetty", peers.Jetty}, peers.TLS12Tickets, []string{"-no_ticket"}, counts{Full: 1, ResumedSessionID: 2}},
			{"two names, no SNI", start{"jetty", peers.Jetty}, peers.TLS12Tickets, []string{"-noservername"}, counts{Full: 1, ResumedTicket: 2}},
			{"two names", start{"jetty", peers.Jetty}, peers.TLS13, nil, counts{Full: 2, ResumedPSK: 1}},
			{"wildcard, ticket extension", start{"jetty", peers.JettyWildcard}, peers.TLS12Tickets, nil, counts{Full: 3}},
			{"wildcard", start{"jetty", peers.JettyWildcard}, peers.TLS13, nil, counts{Full: 2, ResumedPSK: 1}},
			{"one name, ticket extension", start{"jetty", peers.JettyOneName}, peers.TLS12Tickets, nil, counts{Full: 1, ResumedTicket: 2}},
			{"one name", start{"jetty", peers.JettyOneName}, peers.TLS13, nil, counts{Full: 1, ResumedPSK: 2}},
		} {
			if home != "" && !strings.HasPrefix(test.name, "two names") {
				continue // the same of an older Java will do
			}
			t.Run(fmt.Sprintf("%s/%v/%s", filepath.Base(home), test.mode, test.name), func(t *testing.T) {
				backend, _ := launch(t, test.start, peers.Options{Mode: test.mode, JavaHome: home, CloseEach: true})
				session := filepath.Join(t.TempDir(), "session")
				sClient(t, openssl, backend.Address, append([]string{"-sess_out", session}, test.arguments...)...)
				for range 2 {
					sClient(t, openssl, backend.Address, append([]string{"-sess_in", session}, test.arguments...)...)
				}
				got := eventually(t, backend, "3 handshakes", func(c counts) bool { return c.Full+c.Resumed() == 3 })
				got.Connections, got.Requests = 0, 0
				if got != test.want {
					t.Errorf("counts %+v, want %+v", got, test.want)
				}
			})
		}
	}
}

// unclean resumes a session with s_client and kills it, so that the kernel
// sends FIN without close_notify. It reports whether it resumed.
func unclean(t *testing.T, openssl, address, session string) bool {
	t.Helper()
	ready := make(chan bool, 1)
	client, err := process.Start(process.Config{
		Name: "s_client", Path: "sh",
		Args: []string{"-c", `sleep 60 | "$0" s_client -connect "$1" -servername "$2" -tls1_2 -sess_in "$3"`, openssl, address, peers.ServerName, session},
		OnLine: func(line string) bool {
			if strings.HasPrefix(line, "Reused, ") || strings.HasPrefix(line, "New, ") {
				select {
				case ready <- strings.HasPrefix(line, "Reused, "):
				default:
				}
			}
			return true
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Kill()
	select {
	case reused := <-ready:
		return reused
	case <-time.After(10 * time.Second):
		t.Fatalf("s_client did not connect:\n%s", client.Output())
		return false
	}
}

func TestUnsupportedModes(t *testing.T) {
	authority, err := peers.NewAuthority("peers test")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := peers.Go(t.Context(), peers.Options{Authority: authority, Mode: peers.TLS12SessionIDs}); !errors.Is(err, peers.ErrMode) {
		t.Errorf("go with session IDs: %v, want ErrMode", err)
	}
	if _, err := peers.OpenSSL(t.Context(), peers.Options{Authority: authority, HTTP2: true}); !errors.Is(err, peers.ErrMode) {
		t.Errorf("openssl with h2: %v, want ErrMode", err)
	}
	for _, s := range starts {
		if s.name == "nginx" || s.name == "openssl" {
			continue
		}
		if _, err := s.start(t.Context(), peers.Options{Authority: authority, NoSessions: true}); !errors.Is(err, peers.ErrMode) {
			t.Errorf("%s without sessions: %v, want ErrMode", s.name, err)
		}
	}
}
