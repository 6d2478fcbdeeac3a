package replicas

import (
	"crypto/tls"
	"encoding/json"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newGroup(t *testing.T, log *strings.Builder) *Group {
	t.Helper()
	g := New(Config{
		ID: "a", Address: "127.0.0.1:1", TLS: &tls.Config{MinVersion: tls.VersionTLS13},
		Logger: slog.New(slog.NewTextHandler(log, nil)),
	})
	t.Cleanup(func() {
		for _, p := range g.peers {
			p.close()
		}
	})
	return g
}

func said(t *testing.T, r record) *mvccpb.KeyValue {
	t.Helper()
	value, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	return &mvccpb.KeyValue{Key: []byte("/reseal/v1/replicas/" + r.ID), Value: value}
}

func (g *Group) ids() string {
	peers, _ := g.others()
	var ids []string
	for _, p := range peers {
		ids = append(ids, p.id)
	}
	return strings.Join(ids, " ")
}

// TestVanished: a replica that said farewell is gone at once; one that vanished is
// asked for a while longer, as long as it answers.
func TestVanished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, &strings.Builder{})
		for _, id := range []string{"d", "b", "c", "a"} {
			g.take(said(t, record{ID: id, Address: "127.0.0.1:2", Leaving: id == "c"}))
		}
		if got := g.ids(); got != "b c d" {
			t.Errorf("known: %s", got)
		}
		for _, id := range []string{"b", "c", "d", "a", "x"} {
			g.lose(id)
		}
		if got := g.ids(); got != "b d" {
			t.Errorf("after the farewell of c: %s", got)
		}
		broken := status.Error(codes.Unavailable, "error reading from server: EOF")
		if got := g.missing("b", broken).GetReason(); got != "the connection broke (it left etcd 0s ago)" {
			t.Error(got)
		}
		time.Sleep(20 * time.Second)
		g.heard(g.peers["d"], nil)
		g.heard(g.peers["b"], broken)
		time.Sleep(11 * time.Second)
		g.forget(time.Now())
		if got := g.ids(); got != "d" {
			t.Errorf("after %s: %s", lostFor, got)
		}
		g.take(said(t, record{ID: "b", Address: "127.0.0.1:2"}))
		time.Sleep(time.Minute)
		g.forget(time.Now())
		if got := g.ids(); got != "b" {
			t.Errorf("one that came back: %s", got)
		}
	})
}

// TestMovedReplica: one that has another address is called there.
func TestMovedReplica(t *testing.T) {
	g := newGroup(t, &strings.Builder{})
	g.take(said(t, record{ID: "b", Address: "127.0.0.1:2"}))
	before := g.peers["b"]
	g.take(said(t, record{ID: "b", Address: "127.0.0.1:2", Edges: 7}))
	if g.peers["b"] != before || before.said.Edges != 7 {
		t.Error("a number of edges is another connection")
	}
	g.take(said(t, record{ID: "b", Address: "127.0.0.1:3"}))
	if g.peers["b"] == before || g.peers["b"].conn.Target() != "passthrough:///127.0.0.1:3" {
		t.Error("it is still called at its old address")
	}
	g.take(&mvccpb.KeyValue{Key: []byte("/reseal/v1/replicas/b"), Value: []byte("{")})
	if g.ids() != "b" {
		t.Error("nonsense removes a replica")
	}
}

// TestSameName: two replicas with one name are an error of their operator.
func TestSameName(t *testing.T) {
	var log strings.Builder
	g := newGroup(t, &log)
	g.take(said(t, record{ID: "a", Boot: "earlier", StartedAt: g.self.StartedAt.Add(-time.Hour)})) // the process before
	if log.Len() > 0 {
		t.Error(log.String())
	}
	g.take(said(t, record{ID: "a", Boot: "other", StartedAt: g.self.StartedAt.Add(time.Second)}))
	if !strings.Contains(log.String(), "--replica-name") {
		t.Error("nobody says so")
	}
}
