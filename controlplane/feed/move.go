package feed

import (
	"context"
	"math/rand/v2"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Move asks n of the edges that are connected here to connect to another replica, and
// returns how many were asked. Those that the edges choose from is move's.
func (s *Server) Move(_ context.Context, n int, move *resealv1.Move) int {
	message := &resealv1.SyncResponse{Message: &resealv1.SyncResponse_Move{Move: move}}
	asked := 0
	for _, stream := range s.table.some(n) {
		if stream.order(order{message: message}) {
			asked++
		}
	}
	return asked
}

// some are the streams of at most n edges, at random.
func (t *table) some(n int) []*session {
	streams := t.streams()
	rand.Shuffle(len(streams), func(i, j int) { streams[i], streams[j] = streams[j], streams[i] })
	return streams[:min(n, len(streams))]
}
