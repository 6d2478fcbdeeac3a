package feed

import (
	"context"
	"math/rand/v2"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// moveWait bounds how long an edge that is busy is waited for to be asked.
const moveWait = time.Second

// Move asks n of the edges that are connected here to connect to another replica, and
// returns how many were asked. Those that the edges choose from is move's.
func (s *Server) Move(ctx context.Context, n int, move *resealv1.Move) int {
	message := &resealv1.SyncResponse{Message: &resealv1.SyncResponse_Move{Move: move}}
	asked := 0
	for _, stream := range s.table.some(n) {
		timeout := time.NewTimer(moveWait)
		select {
		case stream.orders <- order{message: message}:
			asked++
		case <-stream.done:
		case <-timeout.C:
		case <-ctx.Done():
		}
		timeout.Stop()
	}
	return asked
}

// some are the streams of at most n edges, at random.
func (t *table) some(n int) []*session {
	t.mu.Lock()
	defer t.mu.Unlock()
	var streams []*session
	for _, row := range t.edges {
		if row.stream != nil {
			streams = append(streams, row.stream)
		}
	}
	rand.Shuffle(len(streams), func(i, j int) { streams[i], streams[j] = streams[j], streams[i] })
	return streams[:min(n, len(streams))]
}
