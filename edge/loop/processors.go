package loop

import (
	"runtime"
	"sync"
)

// kept is how many of Go's processors, the rights to run Go code (GOMAXPROCS), loops
// have for themselves. They are the process's, and so is this.
var kept struct {
	mu sync.Mutex
	n  int
}

// keepProcessor gives the process one processor more, for a loop that keeps one while
// it waits, until freeProcessor. All other goroutines have as many as before.
//
// With this Go no longer follows a limit of processors that is changed while the
// process runs, as the number of loops does not either.
func keepProcessor() { adjustProcessors(1) }

func freeProcessor() { adjustProcessors(-1) }

func adjustProcessors(by int) {
	kept.mu.Lock()
	defer kept.mu.Unlock()
	kept.n += by
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + by)
}

// processors is how many there are beside those that loops keep.
func processors() int {
	kept.mu.Lock()
	defer kept.mu.Unlock()
	return runtime.GOMAXPROCS(0) - kept.n
}
