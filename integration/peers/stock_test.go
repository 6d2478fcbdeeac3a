package peers_test

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/peers"
)

// TestStocks starts each stock server, on the newest Java too, and makes two
// requests on a connection each.
func TestStocks(t *testing.T) {
	for _, stock := range peers.Stocks() {
		homes := []string{""}
		if stock.Java {
			homes = peers.Javas()
		}
		for i, home := range homes {
			// Each mode and number of names once is enough.
			o := peers.Options{Mode: peers.Mode(i % 2), OneName: i%2 == 1, JavaHome: home}
			t.Run(fmt.Sprintf("%s/%s%v", stock.Name, pick(home), o.Mode), func(t *testing.T) {
				backend, authority := launch(t, start{stock.Name, stock.Start}, o)
				client := client(t, authority, false)
				client.Transport.(*http.Transport).DisableKeepAlives = true
				for range 2 {
					response, err := client.Get("https://" + backend.Address + peers.Small)
					if err != nil {
						t.Fatal(err)
					}
					_, err = io.Copy(io.Discard, response.Body)
					_ = response.Body.Close()
					if want := map[bool]uint16{true: tls.VersionTLS13, false: tls.VersionTLS12}[o.Mode == peers.TLS13]; err != nil || response.StatusCode != http.StatusOK || response.TLS.Version != want {
						t.Errorf("%s with TLS %x, %v; want 200 with %x", response.Status, response.TLS.Version, err, want)
					}
				}
				counts := eventually(t, backend, "2 handshakes", func(c peers.Counts) bool { return c.Full+c.Resumed() == 2 })
				if counts.Full == 0 || counts.Failed != 0 {
					t.Errorf("counts %+v", counts)
				}
			})
		}
	}
}

func pick(home string) string {
	if home == "" {
		return ""
	}
	return filepath.Base(home) + "/"
}

// TestTap compares what a tap counts with what the server behind it does, for
// each mechanism and each way to end a connection.
func TestTap(t *testing.T) {
	for _, s := range []struct {
		start
		mode peers.Mode
	}{
		{start{"jetty", peers.JettyArranged}, peers.TLS12SessionIDs}, {start{"go", peers.Go}, peers.TLS12Tickets}, {start{"go", peers.Go}, peers.TLS13},
	} {
		t.Run(s.name+"/"+s.mode.String(), func(t *testing.T) {
			backend, authority := launch(t, s.start, peers.Options{Mode: s.mode})
			tap, err := peers.NewTap(backend.Address)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = tap.Close() }()
			config := &tls.Config{RootCAs: authority.Pool(), ServerName: peers.ServerName, ClientSessionCache: tls.NewLRUClientSessionCache(0)}
			ends := []func(*tls.Conn){
				func(c *tls.Conn) {
					// Closing before the server has would be a reset.
					_ = c.CloseWrite()
					_, _ = io.Copy(io.Discard, c)
					_ = c.Close()
				},
				func(c *tls.Conn) { _ = c.NetConn().Close() },
				func(c *tls.Conn) {
					_ = c.NetConn().(*net.TCPConn).SetLinger(0)
					_ = c.NetConn().Close()
				},
			}
			for i, end := range append(ends, ends...) {
				conn, err := tls.Dial("tcp", tap.Address(), config)
				if err != nil {
					t.Fatal(err)
				}
				request(t, conn)
				end(conn)
				n := int64(i + 1)
				eventually(t, backend, fmt.Sprintf("%d connections, %d unclean, %d resets", n, n/3*2+n%3/2, n/3), func(c peers.Counts) bool {
					return c.Connections == n && c.Unclean == n/3*2+n%3/2 && c.Resets == n/3
				})
			}
			// One that is not TLS, and one that ends early.
			for _, text := range []string{"GET / HTTP/1.1\r\n\r\n", "\x16\x03\x01\x00\x10\x01"} {
				conn, err := net.Dial("tcp", tap.Address())
				if err != nil {
					t.Fatal(err)
				}
				_, _ = io.WriteString(conn, text)
				_ = conn.(*net.TCPConn).CloseWrite()
				_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
				_, _ = io.Copy(io.Discard, conn)
				_ = conn.Close()
			}
			var got peers.Counts
			want := eventually(t, backend, "the same as the tap", func(c peers.Counts) bool {
				got = tap.Counts()
				return got.Full == c.Full && got.Resumed() == c.Resumed() && got.Connections == 8 && got.Failed == 1
			})
			if got.ResumedSessionID != want.ResumedSessionID && s.mode == peers.TLS12SessionIDs || got.ResumedTicket != want.ResumedTicket || got.ResumedPSK != want.ResumedPSK ||
				got.Unclean != 4 || got.Resets != 2 || got.Failed != 1 || got.Full == 6 && s.name == "go" {
				t.Errorf("the tap counts %+v, the server %+v", got, want)
			}
		})
	}
}
