package backend

import (
	"io"
	"net/http"
	"testing"
)

// loginSite answers with the connection that a request came by. It asks for a
// log-in at /challenge, and goes on with its answer at /wait when wait is closed.
func loginSite(wait <-chan struct{}) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/challenge" {
			w.Header().Set("WWW-Authenticate", "NTLM")
			w.WriteHeader(http.StatusUnauthorized)
		}
		_, _ = io.WriteString(w, r.RemoteAddr)
		if r.URL.Path == "/wait" {
			_ = http.NewResponseController(w).Flush()
			<-wait
		}
	})
}

// visitor makes requests of one client, with credentials if there are any.
func (x *bench) visitor(client uint64, gone <-chan struct{}) func(path, credentials string) (connection string) {
	return func(path, credentials string) string {
		x.t.Helper()
		req := newRequest(x.t, "GET", path, nil)
		if credentials != "" {
			req.Header.Set("Authorization", credentials)
		}
		call := newCall()
		call.Client, call.Gone = client, gone
		_, body := x.do(req, call)
		return string(body)
	}
}

func (x *bench) privates() int { return x.tally.get(func(c *tally) int { return c.private }) }

// A connection on which a client logs in, or is asked to, is its own, whatever is
// spoken on it: nobody else's request goes over it, and it ends with its client.
func TestConnectionsWithLogIns(t *testing.T) {
	for protocol, start := range map[string]func(testing.TB, http.Handler) *server{
		"h1": func(t testing.TB, h http.Handler) *server { return serve(t, h) },
		"h2": func(t testing.TB, h http.Handler) *server { return serveH2(t, h) },
	} {
		for name, login := range map[string][2]string{
			"NTLM": {"/", "NTLM TlRMTVNTUAAB"}, "Negotiate": {"/", "negotiate YII"}, "a challenge": {"/challenge", ""},
		} {
			t.Run(protocol+" "+name, func(t *testing.T) {
				s := start(t, loginSite(nil))
				x := newBench(t, []string{s.addr})
				gone := make(chan struct{})
				alice, bob := x.visitor(1, gone), x.visitor(2, nil)
				shared := bob("/", "")
				own := alice(login[0], login[1])
				if own != shared {
					t.Errorf("a connection that nobody uses was not taken")
				}
				for range 3 {
					if other := bob("/", ""); other == own {
						t.Fatal("another client's request went over the connection")
					}
					if again := alice("/", ""); again != own {
						t.Error("the client lost its connection")
					}
				}
				if n := x.privates(); n != 1 {
					t.Errorf("%d private connections counted, want 1", n)
				}
				close(gone)
				eventually(t, "the connection has ended with its client", func() bool {
					return x.tally.get(func(c *tally) int { return c.opened - c.closed }) == 1
				})
			})
		}
	}
}

// An HTTP/2 connection that asks for a log-in while other clients' requests are on
// it becomes nobody's: those end well, and it gets no more.
func TestChallengeOnSharedH2Connection(t *testing.T) {
	wait := make(chan struct{})
	s := serveH2(t, loginSite(wait))
	x := newBench(t, []string{s.addr})
	alice, bob := x.visitor(1, nil), x.visitor(2, nil)
	alice("/", "")
	call := newCall()
	call.Client = 2
	held, err := x.RoundTrip(newRequest(t, "GET", "/wait", nil), call)
	if err != nil {
		t.Fatal(err)
	}
	asked := alice("/challenge", "")
	for client, visit := range map[string]func(string, string) string{"the one that was asked": alice, "the other": bob} {
		if visit("/", "") == asked {
			t.Errorf("a request of %s still went over the connection", client)
		}
	}
	close(wait)
	body, err := io.ReadAll(held.Body)
	if err != nil || string(body) != asked {
		t.Errorf("the other client's answer: %q over %q, %v", body, asked, err)
	}
	held.Body.Close()
	if n := x.privates(); n != 1 {
		t.Errorf("%d private connections counted, want 1", n)
	}
	eventually(t, "the connection has ended", func() bool {
		return x.tally.get(func(c *tally) int { return c.closed }) == 1
	})
}

// claim implements claimant.
type claim chan<- grant

func (c claim) granted(g grant) { c <- g }

// A request that logs in need not wait for an answer to have the connection to
// itself.
func TestLogInHasItsConnectionAtOnce(t *testing.T) {
	s := serveH2(t, loginSite(nil))
	x := newBench(t, []string{s.addr})
	x.get("/")
	e := x.current("p").state.Load().endpoints[s.addr]
	key := connKey{serverName: testName}
	acquire := func(client uint64, private bool) grant {
		got := make(chan grant, 1)
		l := x.Loops.Next()
		l.Post(func() {
			call := newCall()
			call.Client = client
			w := &waiter{call: call, private: private, loop: l, by: claim(got)}
			if g, now := e.acquire(key, w); now {
				got <- g
			}
		})
		g := <-got
		if g.err != nil {
			t.Fatal(g.err)
		}
		return g
	}
	login, other := acquire(1, true), acquire(2, false)
	if other.on == login.on {
		t.Error("another client got a stream of the connection")
	}
	login.drop()
	other.drop()
}
