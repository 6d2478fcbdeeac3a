package integration

import (
	"context"
	"crypto/tls"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// rolloutStatus is what `resealctl rollout status -o json` shows.
type rolloutStatus struct {
	Phase             string   `json:"phase"`
	BaseRevision      int64    `json:"baseRevision"`
	CandidateRevision int64    `json:"candidateRevision"`
	Reason            string   `json:"reason"`
	MovedEdges        []string `json:"movedEdges"`
}

// staged is a world with edges that serve the same pool, under requests.
type staged struct {
	*world
	edges   []*harness.Edge
	pool    func(trust []byte, more string) string
	clients []*http.Client
	seen    map[int64]map[string]bool // edges that were to serve a revision
}

func newStaged(t *testing.T) *staged {
	s := &staged{world: newWorld(t), seen: map[int64]map[string]bool{}}
	backend := s.Launch(t, peers.Go, peers.Options{})
	s.pool = func(trust []byte, more string) string {
		return strings.Replace(s.Pool("app", []*peers.Backend{backend}, more), harness.Indent(s.Authority.PEM(), 8), harness.Indent(trust, 8), 1)
	}
	s.StartControlPlane()
	manifest := harness.Certificate("site", s.Pair) + s.pool(s.Authority.PEM(), "")
	for i := range 4 {
		id := fmt.Sprint("edge-", i)
		s.edges = append(s.edges, s.StartEdge(id, "edge="+id))
		address := s.Address()
		manifest += harness.Listener(id, address, "edge: "+id, "  pool: app\n")
		client := s.Client(t, address, false)
		client.Timeout = 5 * time.Second
		s.clients = append(s.clients, client)
	}
	s.WaitAcked(s.Apply(manifest), s.edges...)
	return s
}

// load sends requests to every edge until the test ends. Some fail: that is what
// the changes do.
func (s *staged) load() {
	ctx, cancel := context.WithCancel(context.Background())
	var workers sync.WaitGroup
	const each = 32 // so many that there is enough to judge by where answers are slow
	for n := range each * len(s.edges) {
		workers.Go(func() {
			for ctx.Err() == nil {
				_ = s.get(ctx, n/each)
				time.Sleep(each * 10 * time.Millisecond)
			}
		})
	}
	s.t.Cleanup(func() { cancel(); workers.Wait() })
}

func (s *staged) get(ctx context.Context, i int) error {
	return harness.Get(ctx, s.clients[i], "https://"+harness.SiteName+peers.Small, peers.Body(peers.Small))
}

func (s *staged) rollout() (status rolloutStatus) {
	s.CtlJSON(&status, "rollout", "status")
	s.look()
	return status
}

// look notes which revisions edges are to serve.
func (s *staged) look() []harness.EdgeStatus {
	edges := s.Edges()
	for _, edge := range edges {
		if s.seen[edge.TargetRevision] == nil {
			s.seen[edge.TargetRevision] = map[string]bool{}
		}
		s.seen[edge.TargetRevision][edge.ID] = true
	}
	return edges
}

// until waits for a phase of a revision.
func (s *staged) until(phase string, revision int64, within time.Duration) rolloutStatus {
	s.t.Helper()
	for deadline := time.Now().Add(within); ; time.Sleep(50 * time.Millisecond) {
		status := s.rollout()
		if status.Phase == phase && status.CandidateRevision == revision {
			return status
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("revision %d is not %s: %+v", revision, phase, status)
		}
	}
}

// undone checks that a revision was stopped at the first stage and taken back, and
// that the edge that had it serves again soon.
func (s *staged) undone(t *testing.T, revision int64, reason string, within time.Duration) {
	t.Helper()
	status := s.until("undone", revision, within)
	if !strings.Contains(status.Reason, reason) {
		t.Errorf("undone because %q, should speak of %q", status.Reason, reason)
	}
	// It may have been over before anybody looked.
	had := maps.Clone(s.seen[revision])
	if had == nil {
		had = map[string]bool{}
	}
	for _, edge := range s.edges {
		if strings.Contains(edge.Output(), fmt.Sprintf(`"msg":"configuration applied","revision":%d,`, revision)) {
			had[edge.ID] = true
		}
	}
	if len(had) != 1 {
		t.Errorf("%d edges got it: %v", len(had), had)
	}
	stopped := time.Now()
	for i := range s.edges {
		for s.get(t.Context(), i) != nil {
			if time.Since(stopped) > 10*time.Second {
				t.Fatalf("%s does not serve 10s after the change was undone", s.edges[i].ID)
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
	t.Logf("all edges serve %v after it was stopped: %s", time.Since(stopped).Round(time.Millisecond), status.Reason)
	if history := s.Ctl("history"); !strings.Contains(history, "undone: ") || !strings.Contains(history, reason) {
		t.Errorf("the history does not tell of it:\n%s", history)
	}
}

// TestRollout: changes that pass validation and do harm touch one edge, and are
// taken back from it by themselves.
func TestRollout(t *testing.T) {
	s := newStaged(t)
	s.load()
	time.Sleep(2 * time.Second) // so that there is something to compare with

	good := s.Apply(s.pool(s.Authority.PEM(), "  timeouts: {responseHeader: 11s}\n"))
	s.until("done", good, 30*time.Second)
	s.WaitAcked(good, s.edges...)

	t.Run("makes requests fail", func(t *testing.T) {
		other, err := peers.NewAuthority("another")
		if err != nil {
			t.Fatal(err)
		}
		s.undone(t, s.Apply(s.pool(other.PEM(), "")), "failed on edges that have it", 30*time.Second)
	})
	t.Run("is answered with 5xx", func(t *testing.T) {
		ill := s.server(func(w http.ResponseWriter) { w.WriteHeader(http.StatusInternalServerError) })
		s.undone(t, s.Apply(s.Pool("app", []*peers.Backend{ill}, "")), "were answered with 5xx on edges that have it", 30*time.Second)
	})
	t.Run("makes clients wait", func(t *testing.T) {
		slow := s.server(func(w http.ResponseWriter) {
			time.Sleep(400 * time.Millisecond)
			_, _ = w.Write(peers.Body(peers.Small))
		})
		s.undone(t, s.Apply(s.Pool("app", []*peers.Backend{slow}, "")), "waited longer than 300ms on edges that have it", 30*time.Second)
	})
	t.Run("makes an edge crash", func(t *testing.T) {
		revision := s.Apply(s.pool(s.Authority.PEM(), "  timeouts: {responseHeader: 12s}\n"))
		s.crash(revision, 0)
		s.undone(t, revision, "crashed with it", 30*time.Second)
	})
	t.Run("makes an edge crash later", func(t *testing.T) {
		policy := s.Apply("---\napiVersion: reseal/v1\nkind: RolloutPolicy\nmetadata: {name: default}\nspec: {stages: [{edges: 1, soak: 90s}, {percent: 100}]}\n")
		s.until("done", policy, 10*time.Second) // a change goes by the policy that was in force before it
		wait := 20 * time.Second
		if harness.Long() {
			wait = time.Minute
		}
		revision := s.Apply(s.pool(s.Authority.PEM(), "  timeouts: {responseHeader: 13s}\n"))
		s.crash(revision, wait)
		s.undone(t, revision, "crashed with it", 30*time.Second)
	})
}

// server is a backend that does what serve does.
func (s *staged) server(serve func(http.ResponseWriter)) *peers.Backend {
	s.t.Helper()
	pair, err := s.Authority.Issue(peers.ServerName)
	if err != nil {
		s.t.Fatal(err)
	}
	certificate, err := tls.X509KeyPair(pair.Certificate, pair.Key)
	if err != nil {
		s.t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { serve(w) }))
	server.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
	server.StartTLS()
	s.t.Cleanup(server.Close)
	return &peers.Backend{Address: server.Listener.Addr().String()}
}

// crash kills the first edge that has a revision, some time after it took it.
func (s *staged) crash(revision int64, after time.Duration) {
	s.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		for i, edge := range s.look() {
			if edge.AckedRevision == revision {
				time.Sleep(after)
				s.edges[i].Kill()
				s.edges[i].Start()
				return
			}
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("no edge took revision %d", revision)
		}
	}
}
