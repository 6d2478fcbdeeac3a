// Package sessions relays the TLS sessions that edges hold with backends to
// other edges of the same pool. They are sealed from edge to edge; the relay
// keeps nothing but what is under way, in memory.
package sessions

import (
	"context"
	"crypto/x509"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// entitleInterval is how often the relay checks who is entitled to what.
	entitleInterval = 5 * time.Second
	// revokedFor is how long edges that join hear of a revocation: no session
	// lives longer on another edge.
	revokedFor = time.Hour

	maxMembers = 16384
	maxRevoked = 1024
)

// Config is what a relay needs. It is read once, by New.
type Config struct {
	// Edge names the caller of a stream, with the labels that its join token
	// gave it; nil: those that it says. An error that carries no gRPC status is
	// PERMISSION_DENIED. Required.
	Edge func(ctx context.Context) (id string, labels map[string]string, err error)
	// Pools returns the names of the pools with sharing: fleet in the
	// configuration of an edge with these labels. It is called at each join, and
	// every 5 s for each set of labels. Required.
	Pools func(labels map[string]string) []string
	// Roots returns the fleet's authority, to verify the certificates that edges
	// send. Nil: the edges alone verify them.
	Roots func() *x509.CertPool
	// Logger is for the operator of this process. Default: nowhere.
	Logger *slog.Logger
}

// Server implements SessionService.
type Server struct {
	resealv1.UnimplementedSessionServiceServer

	config  Config
	stopped chan struct{} // closed when Run has ended

	mu      sync.Mutex
	members map[string]*member // by edge
	streams int                // members and those that have not joined yet
	revoked map[string]time.Time
	seeds   uint64 // number of the newest
	queued  int    // bytes of all offers under way
}

// New makes a relay.
func New(config Config) *Server {
	if config.Logger == nil {
		config.Logger = slog.New(slog.DiscardHandler)
	}
	return &Server{
		config:  config,
		stopped: make(chan struct{}),
		members: map[string]*member{},
		revoked: map[string]time.Time{},
	}
}

// Run follows who is entitled to what until ctx ends, and then ends all streams.
// It may be called once and returns nil.
func (s *Server) Run(ctx context.Context) error {
	defer close(s.stopped)
	ticker := time.NewTicker(entitleInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			s.entitleAll()
		case <-ctx.Done():
			return nil
		}
	}
}

// Revoke ends an edge's stream and has the other edges drop the sessions that
// came from it or through it.
func (s *Server) Revoke(edge string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forgetRevoked()
	if len(s.revoked) < maxRevoked {
		s.revoked[edge] = time.Now()
	}
	if m := s.members[edge]; m != nil {
		s.leaveLocked(m)
		m.end(status.Errorf(codes.PermissionDenied, "edge %q was revoked", edge))
	}
	for _, m := range s.members {
		m.push(gone(edge, true))
	}
}

func (s *Server) forgetRevoked() {
	maps.DeleteFunc(s.revoked, func(_ string, at time.Time) bool { return time.Since(at) > revokedFor })
}

func gone(edge string, revoked bool) *resealv1.ExchangeResponse {
	return &resealv1.ExchangeResponse{Message: &resealv1.ExchangeResponse_Gone{
		Gone: &resealv1.ExchangeGone{Edge: edge, Revoked: revoked},
	}}
}

// entitleAll follows a changed configuration.
func (s *Server) entitleAll() {
	s.mu.Lock()
	labels := map[string]map[string]string{}
	for _, m := range s.members {
		labels[labelsKey(m.labels)] = m.labels
	}
	s.mu.Unlock()
	pools := map[string][]string{}
	for key, set := range labels {
		pools[key] = s.config.Pools(set)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range s.members {
		if allowed, ok := pools[labelsKey(m.labels)]; ok {
			s.seed(m, s.entitle(m, allowed), false)
		}
	}
}

func labelsKey(labels map[string]string) string {
	var key strings.Builder
	for _, name := range slices.Sorted(maps.Keys(labels)) {
		key.WriteString(name + "\x00" + labels[name] + "\x00")
	}
	return key.String()
}

// entitle makes the pools of m those that it wants and is allowed to have, tells
// the members, and returns the pools that are new to m.
func (s *Server) entitle(m *member, allowed []string) []string {
	before := m.entitled
	m.entitled = map[string]bool{}
	var added []string
	for _, pool := range m.wanted {
		if slices.Contains(allowed, pool) {
			m.entitled[pool] = true
			if !before[pool] {
				added = append(added, pool)
			}
		}
	}
	for _, other := range s.members {
		if other != m {
			link(m, other)
		}
	}
	return added
}
