package frontend

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
)

// TestAddressWidensAndNarrows changes a listener's address between 127.0.0.1 and
// all interfaces while clients come and go: none is refused, and none that is
// connected notices.
func TestAddressWidensAndNarrows(t *testing.T) {
	e := newEdge(t, answering("ok"))
	port := freePort(t)
	at := func(host string) func(*exchange.Listener) {
		return func(l *exchange.Listener) { l.Spec.Address = net.JoinHostPort(host, port) }
	}
	e.apply(e.listener("main", at("127.0.0.1")))
	get := func(host string) error {
		transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: e.roots, ServerName: "app.test"}, DisableKeepAlives: true}
		request, err := http.NewRequest("GET", "https://"+net.JoinHostPort(host, port)+"/", nil)
		if err != nil {
			return err
		}
		request.Host = "app.test"
		response, err := (&http.Client{Transport: transport}).Do(request)
		if err == nil {
			response.Body.Close()
		}
		return err
	}
	old := must[*tls.Conn](t)(tls.Dial("tcp", "127.0.0.1:"+port, &tls.Config{RootCAs: e.roots, ServerName: "app.test"}))
	defer old.Close()
	answers := bufio.NewReader(old)
	var load sync.WaitGroup
	var served atomic.Int64
	stop := make(chan struct{})
	for range 2 {
		load.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := get("127.0.0.1"); err != nil {
					t.Error(err)
					return
				}
				served.Add(1)
			}
		})
	}
	for i, host := range []string{"", "127.0.0.1", "0.0.0.0", "", "127.0.0.1", "", "127.0.0.1"} {
		before := served.Load()
		e.apply(e.listener("main", at(host)))
		eventually(t, "clients come", func() bool { return served.Load() > before+5 || t.Failed() })
		fmt.Fprint(old, "GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
		bodyOf(t, must[*http.Response](t)(http.ReadResponse(answers, nil)))
		if err := get("127.0.0.2"); host != "127.0.0.1" && err != nil {
			t.Errorf("%d: another interface: %v", i, err)
		}
		if host == "127.0.0.1" {
			eventually(t, "other interfaces are refused", func() bool { return get("127.0.0.2") != nil })
		}
	}
	close(stop)
	load.Wait()
	t.Logf("%d clients were served", served.Load())
	// Removed with all its sockets.
	e.apply(e.listener("main", at("")))
	e.apply()
	if again, err := net.Listen("tcp", ":"+port); err != nil {
		t.Errorf("something is still bound: %v", err)
	} else {
		again.Close()
	}
}

// TestOverlapIsRefused: what overlaps with a socket of somebody else, or of
// another listener of the same configuration, is refused as usual.
func TestOverlapIsRefused(t *testing.T) {
	e := newEdge(t, answering("ok"))
	port := freePort(t)
	at := func(host string) func(*exchange.Listener) {
		return func(l *exchange.Listener) { l.Spec.Address = net.JoinHostPort(host, port) }
	}
	e.apply(e.listener("main", at("127.0.0.1")))
	taken := must[net.Listener](t)(net.Listen("tcp", "127.0.0.3:"+port))
	defer taken.Close()
	for name, listeners := range map[string][]exchange.Listener{
		"somebody else":    {e.listener("main", at(""))},
		"another listener": {e.listener("main", at("127.0.0.1")), e.listener("wide", at(""))},
		"another wide":     {e.listener("main", at("0.0.0.0")), e.listener("wide", at(""))},
	} {
		change, violations := e.frontend.Prepare(listeners)
		if change != nil || len(violations) != 1 || !strings.HasPrefix(violations[0].Description, "address already in use") {
			t.Errorf("%s: %v", name, violations)
		}
		if change != nil {
			change.Abort()
		}
	}
	response := must[*http.Response](t)(e.client(true).Get("https://app.test/"))
	bodyOf(t, response)
	// And nobody can join in.
	if other, err := listen("127.0.0.1:"+port, true); err == nil {
		other.Close()
		t.Error("another process could take clients away")
	}
}

// freePort is one that is free on all interfaces and that the system gives to
// nobody who asks for any.
func freePort(t *testing.T) string {
	t.Helper()
	for range 100 {
		port := fmt.Sprint(20000 + rand.IntN(10000))
		if l, err := net.Listen("tcp", ":"+port); err == nil {
			l.Close()
			return port
		}
	}
	t.Fatal("no port is free")
	return ""
}
